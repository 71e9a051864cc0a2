"""The page itself: what a newcomer wants first, then everything that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.record import RESULTS
from bench.report import tables
from bench.report.choice import Device, choose
from bench.report.plots import draw_all
from bench.sources import ROOT, fingerprints

_INTRODUCTION = """\
# Performance

<!-- Made by `python -m bench report` from bench/results/. Do not edit. -->

How much faster a model becomes depends on three things: how much of your batches is **padding**
(encoder_fast computes none of it), how **long** your texts are, and what you compare with. Every
figure here was measured beside its peers in the same run, in turn, after a parity check, and has a
record with every single sample. What is slower than a peer is shown as such.
"""

_HOW = """\
## How it was measured

- **Parity first.** Each contestant's numbers are compared with float64 by the
  [parity rule](../CONTRIBUTING.md#the-parity-rule) before it is timed. *error* is its error in
  units of the eager original's in the same dtype. The rule allows 2 and a rounding step more; who
  breaks it gets no figure.
- **In turn.** All contestants of a case are alive at once and run round after round, so that a busy
  moment hits all of them. Times are medians; *p20 to p80* is the spread from the 20th to the 80th
  percentile of the rounds, as a share of the median. On a GPU contestants that compile run last,
  beside ours in a race of their own.
- **Settled.** Where models run on a CPU each contestant waits for 20 ms first, so that the threads
  of the one before are asleep, and of calls below 0.1 s the second of two in a row counts.
- **Real tokens.** Tokens a second count those that are not padding, for everybody.
- **Weights** are random and seeded, in the published sizes, unless a model is named as real; speed
  does not depend on them. *4 of 12 layers* means what it says: on a CPU a model's layers are cut to
  keep the run short, and as all of them are alike the ratios stay what they are.
- **Batches.** *half* has lengths spread evenly, so that half of it is padding; *squad* has lengths
  drawn like those of questions with their paragraphs (log-normal about 165 of 384 tokens; not the
  data set itself).
- **Peers at their best.** torch.compile for fixed shapes, max-autotune with frozen weights on a
  CPU; ONNX Runtime after its own transformer optimizer; OpenVINO compiled for the dtype.
- **Peak memory** is what building the contestant and its first call add at the highest, an
  exporter's own copies included.
- **Roofs** are measured in each run: a copy, and square GEMMs in each precision. A share is that of
  the roofs of the same run; the picture and the line above the table have the newest.

```console
$ make bench        # this machine, under 15 minutes on two CPU cores
$ make bench-gpu    # an NVIDIA GPU, under 9 minutes
$ python -m bench models --filter "BERT-base fp32"
$ python -m bench compare A.json B.json
$ python -m bench report
```
"""


def write_report(results: Path = RESULTS, docs: Path = ROOT / "docs") -> Path:
    """Write ``performance.md`` and its pictures.

    Raises:
        ValueError: there is no record.
    """
    devices = choose(results, fingerprints())
    if not devices:
        raise ValueError(f"there is no record in {results.name}/: run python -m bench all")
    parts = [_INTRODUCTION]
    for device in devices:
        pictures = draw_all(device, docs / "performance" / device.slug)
        parts.extend(_device(device, dict(pictures)))
    if not any(device.is_gpu for device in devices):
        parts.append("**No GPU timing has been recorded yet.**\n")
    parts.append(_HOW)
    path = docs / "performance.md"
    path.write_text("\n".join(parts), "utf-8")
    return path


def _device(device: Device, pictures: dict[str, str]) -> Iterator[str]:
    yield f"## {_title(device)}\n"
    yield from _staleness(device)
    if device.has("models"):
        yield (
            "How many times as fast as Hugging Face's SDPA in the same dtype (as eager, for models "
            "that have no SDPA), and in brackets as the **fastest of all peers** measured; of "
            "several batches the smallest figure.\n"
        )
        yield tables.glance(device) + "\n"
        yield _sentence(device) + "\n"
        yield _picture(device, "speed", pictures)
        yield "### Whole models\n"
        yield tables.headline(device) + "\n"
    if device.has("texts"):
        yield "### From strings to vectors\n\nTokenizer, batching, model and pooling together.\n"
        yield tables.texts(device) + "\n"
    if device.has("latency"):
        yield "### One text and eight\n"
        yield (
            "*Outside kernels* is the share of a call in which no kernel runs, or on a CPU no "
            "PyTorch operation, by PyTorch's profiler. Of less than a hundred rounds p99 is "
            "little else than the slowest.\n"
        )
        yield _picture(device, "latency", pictures)
        yield _folded("Every latency", tables.latency(device))
    if device.has("kernels"):
        yield "### Single ops\n"
        roofs = device.records("kernels")[0].header["roofs"]
        yield _roofs(roofs) + "\n"
        yield _picture(device, "roofline", pictures)
        yield tables.kernels(device) + "\n"
    if device.has("models"):
        yield _folded("Every contestant of every batch", tables.contestants(device, "models"))
    absent = list(tables.absent(device))
    if absent:
        yield _folded("Who did not run, and why", "\n".join(absent))
    yield from _records(device)


def _title(device: Device) -> str:
    machine = device.records()[0].header["machine"]
    if machine["kind"] == "gpu":
        return device.name
    return f"{device.name}, {machine['threads']} cores"


def _sentence(device: Device) -> str:
    """The whole table in one sentence, over what people run today and over the fastest peer."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for case in device.cases("models"):
        if case.ours and case.baseline and case.best_peer:
            kind = "without padding" if case.facts["padding"] == 0 else "with padding"
            today = case.baseline.median / case.ours.median
            best = case.best_peer.median / case.ours.median
            groups.setdefault(kind, []).append((today, best))
    parts = []
    for kind, pairs in sorted(groups.items()):
        today, best = (sorted(values) for values in zip(*pairs, strict=True))
        parts.append(
            f"Over {len(pairs)} batches {kind}, encoder_fast ran at {_range(today)} the speed that "
            f"people have today, and at {_range(best)} that of the fastest peer."
        )
    return " ".join(parts)


def _range(values: list[float]) -> str:
    low, high = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _roofs(roofs: dict[str, float]) -> str:
    gemms = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in roofs.items() if name != "copy"
    )
    return f"Roofs: a copy at {roofs['copy'] / 1e9:,.1f} GB/s; GEMMs in {gemms}."


def _picture(device: Device, name: str, pictures: dict[str, str]) -> str:
    if name not in pictures:
        return ""
    base = f"performance/{device.slug}/{name}"
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">\n'
        f'  <img alt="{pictures[name]}" src="{base}-light.svg">\n'
        "</picture>\n"
    )


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>\n"


def _staleness(device: Device) -> Iterator[str]:
    files: dict[str, None] = {}
    for suite in device.taken:
        for row in device.rows(suite):
            files.update(dict.fromkeys(device.stale(row)))
    if files:
        names = ", ".join(f"`{name}`" for name in sorted(files))
        yield (
            f"> **⚠ Some of this code has changed since it was measured**: {names}. Figures that "
            "depend on it bear the sign ⚠.\n"
        )


def _records(device: Device) -> Iterator[str]:
    yield "Measured by:\n"
    for record in device.records():
        path, header = record.path, record.header
        suites = [suite for suite in device.taken if record in device.records(suite)]
        versions = header["machine"]["versions"]
        used = ", ".join(f"{k} {v}" for k, v in versions.items() if v != "not installed")
        stopped = "" if header["finished"] else " (stopped before its end)"
        quick = " (quick: few rounds)" if header["quick"] else ""
        # from docs/ to the record, wherever the results lie in the repository
        link = f"../bench/results/{device.slug}/{path.name}"
        yield (
            f"- {', '.join(suites)}: `{header['command']}` at commit `{header['commit']}`, "
            f"{header['date'][:10]}, {header['run_seconds']:.0f} s{quick}{stopped}; {used}: "
            f"[record]({link})"
        )
    yield ""
