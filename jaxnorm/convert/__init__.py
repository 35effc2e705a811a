"""Norms and models from PyTorch, Keras and Haiku, and back to PyTorch.

`import jaxnorm` does not import it: `import jaxnorm.convert`. It imports none of these libraries,
so a state dict may hold NumPy arrays that were made elsewhere. Files of safetensors are read by
their own library, whose result is what `from_torch` and `load` take:

    arrays = safetensors.numpy.load_file("model.safetensors")

What is converted is a copy; training on one side does not change the other.
"""

from jaxnorm.convert.haiku_norms import from_haiku, haiku_momentum
from jaxnorm.convert.keras_norms import from_keras, keras_options
from jaxnorm.convert.models import load
from jaxnorm.convert.torch_norms import from_torch, to_torch, torch_options

__all__ = [
    "from_haiku",
    "from_keras",
    "from_torch",
    "haiku_momentum",
    "keras_options",
    "load",
    "to_torch",
    "torch_options",
]
