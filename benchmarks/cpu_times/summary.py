"""Summary statistics of the measurements."""

import math
import statistics
from typing import Any

OURS = "jaxnorm"
COPY = "copy"
SHORT = 50e-6  # seconds; shorter calls vary more from process to process
TOLERANCE, SHORT_TOLERANCE = 1.05, 1.15

Results = list[dict[str, Any]]


def peer_medians(result: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of every peer except jaxnorm."""
    return {
        name: measured["median"]
        for name, measured in result["peers"].items()
        if not name.startswith(OURS) and name != COPY
    }


def ratio(result: dict[str, Any], peer: str | None = None) -> float | None:
    """Return time of jaxnorm / time of a peer, by default the fastest; None if one is missing."""
    peers = peer_medians(result)
    if OURS not in result["peers"] or not peers or (peer and peer not in peers):
        return None
    return result["peers"][OURS]["median"] / (peers[peer] if peer else min(peers.values()))


def speedup(results: Results, peer: str | None = None) -> float | None:
    """Return the geometric mean over all cases of time of a peer / time of jaxnorm."""
    logs = [math.log(r) for result in results if (r := ratio(result, peer)) is not None]
    return math.exp(-statistics.fmean(logs)) if logs else None


def behind(results: Results) -> list[dict[str, Any]]:
    """Return the cases in which a peer is faster by more than the tolerance, and that peer."""
    found = []
    for result in results:
        slower = ratio(result)
        if slower is None:
            continue
        short = result["peers"][OURS]["median"] < SHORT
        if slower > (SHORT_TOLERANCE if short else TOLERANCE):
            peers = peer_medians(result)
            fastest = min(peers, key=peers.__getitem__)
            found.append({"case": result["case"], "peer": fastest, "ratio": slower})
    return sorted(found, key=lambda row: -row["ratio"])


def summarize(results: Results) -> dict[str, Any]:
    """Summarize the results, for results.json."""
    return {
        "compared": sum(ratio(result) is not None for result in results),
        "speedup_over_fastest_peer": speedup(results),
        "speedup_over_flax": speedup(results, "flax.linen"),
        "behind": behind(results),
    }


def sentences(summary: dict[str, Any], most: int | None = None) -> list[str]:
    """Write the summary as sentences, with at most `most` cases in which jaxnorm is slower."""
    lines = []
    for key, whom in (("over_fastest_peer", "the fastest peer"), ("over_flax", "flax.linen")):
        value = summary[f"speedup_{key}"]
        if value is not None:
            lines.append(
                f"Geometric mean over all cases of time of {whom} / time of jaxnorm: "
                f"{value:.2f} (above 1, jaxnorm is faster)."
            )
    if not lines:
        return ["Nothing to compare: jaxnorm or all of its peers were not measured."]
    rows = summary["behind"]
    lines.append(
        f"jaxnorm is slower than the fastest peer by more than 5 % (15 % under 50 us) in "
        f"{len(rows)} of {summary['compared']} cases{':' if rows else '.'}"
    )
    lines += [f"  {r['case']}: {r['ratio']:.2f} times {r['peer']}" for r in rows[:most]]
    if most is not None and len(rows) > most:
        lines.append(f"  and {len(rows) - most} more, in table.md")
    return lines
