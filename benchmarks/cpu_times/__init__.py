"""Times, memory and errors of the norms of jaxnorm and of other libraries."""
