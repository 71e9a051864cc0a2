"""The tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.record import OK, SKIPPED, Row
from bench.report.choice import Case, Device
from bench.roofs import roof_seconds

STALE = " ⚠"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A column whose header begins with a capital is text; the others are figures."""
    rule = ["---" if header[:1].isupper() else "--:" for header in headers]
    lines = [headers, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def speedup(case: Case, other: Row | None) -> str:
    """Ours over another's, as many times as fast; a dash where there is none."""
    ours = case.ours
    if ours is None or other is None:
        return "-"
    value = times(other.median / ours.median)
    return f"**{value}**" if other.median > ours.median else value


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe(case: Case) -> str:
    """A batch in words."""
    facts = case.facts
    count, longest = facts["batch"], facts["longest"]
    texts = f"{count} text{'s' if count > 1 else ''}"
    if facts["padding"] == 0:
        return f"{texts} of {longest} tokens"
    return f"{texts} up to {longest} tokens, {facts['padding']:.0%} padding"


def model_title(case: Case) -> str:
    facts = case.facts
    if facts["layers"] == facts["all_layers"]:
        return str(facts["model"])
    return f"{facts['model']} ({facts['layers']} of {facts['all_layers']} layers)"


def mark(device: Device, row: Row) -> str:
    return STALE if device.stale(row) else ""


def glance(device: Device) -> str:
    """A row for each model, a column for each dtype with and without padding."""
    cells: dict[tuple[str, str], list[Case]] = {}
    for case in device.cases("models"):
        if case.ours and case.baseline:
            padding = "no padding" if case.facts["padding"] == 0 else "half padding"
            column = f"{case.facts['dtype']}, {padding}"
            cells.setdefault((case.facts["model"], column), []).append(case)
    models = dict.fromkeys(model for model, _ in cells)
    columns = sorted({column for _, column in cells})
    rows = [
        [model, *(_glance_cell(device, cells.get((model, column), [])) for column in columns)]
        for model in models
    ]
    return table(["Model", *columns], rows)


def _glance_cell(device: Device, cases: list[Case]) -> str:
    """Over what people run today and, in brackets, over the fastest peer; of several, the least."""
    today = [c.baseline.median / c.ours.median for c in cases if c.ours and c.baseline]
    best = [c.best_peer.median / c.ours.median for c in cases if c.ours and c.best_peer]
    if not today:
        return "-"
    stale = any(device.stale(case.ours) for case in cases if case.ours)
    return f"**{times(min(today))}** ({times(min(best))}){STALE if stale else ''}"


def headline(device: Device) -> str:
    """A row for each model and batch: how many times as fast."""
    rows = []
    for case in device.cases("models"):
        ours, best = case.ours, case.best_peer
        if ours is None:
            continue
        tokens = case.facts["tokens"] / ours.median
        rows.append(
            [
                model_title(case),
                case.facts["dtype"],
                describe(case),
                f"{tokens:,.0f}{mark(device, ours)}",
                speedup(case, case.row("Hugging Face eager")),
                speedup(case, case.row("Hugging Face SDPA")),
                speedup(case, best),
                best.contestant if best else "-",
            ]
        )
    headers = ("Model", "Dtype", "Batch", "real tokens/s", "over eager", "over SDPA")
    return table([*headers, "over the fastest peer", "Which is"], rows)


def contestants(device: Device, suite: str) -> str:
    """Every contestant of every case that was timed."""
    rows = []
    for case in device.cases(suite):
        baseline = case.baseline
        for row in sorted(case.timed, key=lambda row: row.median):
            name = f"**{row.contestant}**{mark(device, row)}" if row.ours else row.contestant
            memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:,.0f}"
            ratio = "-" if baseline is None else times(baseline.median / row.median)
            facts = case.facts
            parity = row.parity or {}
            error, original = parity.get("error"), parity.get("original_error")
            rows.append(
                [
                    case.name if not rows or rows[-1][-1] != case.name else "",
                    name,
                    milliseconds(row.median),
                    f"{row.spread:.0%}",
                    f"{facts['tokens'] / row.median:,.0f}",
                    ratio,
                    *([memory] if suite == "models" else []),
                    f"{error / original:.2f}" if error is not None and original else "-",
                    case.name,
                ]
            )
    memory = ["peak MiB"] if suite == "models" else []
    headers = ["Case", "Contestant", "ms", "p20 to p80", "real tokens/s", "speed", *memory]
    return table([*headers, "error"], [row[:-1] for row in rows])


def latency(device: Device) -> str:
    rows = []
    for case in device.cases("latency"):
        for row in sorted(case.timed, key=lambda row: row.median):
            assert row.seconds is not None
            outside = row.outside_kernels
            rows.append(
                [
                    f"{model_title(case)}, {describe(case)}, {case.facts['dtype']}",
                    f"**{row.contestant}**{mark(device, row)}" if row.ours else row.contestant,
                    milliseconds(row.seconds["p50"]),
                    milliseconds(row.seconds["p99"]),
                    str(row.seconds["n"]),
                    "-" if outside is None else f"{outside:.0%}",
                ]
            )
    for i in range(len(rows) - 1, 0, -1):
        if rows[i][0] == rows[i - 1][0]:
            rows[i][0] = ""
    return table(["Case", "Contestant", "p50 ms", "p99 ms", "rounds", "outside kernels"], rows)


def texts(device: Device) -> str:
    rows = []
    for case in device.cases("texts"):
        for row in sorted(case.timed, key=lambda row: row.median):
            rows.append(
                [
                    f"{case.name}, {case.facts['tokens'] / case.facts['texts']:.0f} tokens each",
                    f"**{row.contestant}**{mark(device, row)}" if row.ours else row.contestant,
                    f"{case.facts['texts'] / row.median:,.0f}",
                    f"{case.facts['tokens'] / row.median:,.0f}",
                    f"{row.spread:.0%}",
                    "-" if case.baseline is None else times(case.baseline.median / row.median),
                    "-" if case.best_peer is None else times(case.best_peer.median / row.median),
                ]
            )
    headers = ["Texts", "Contestant", "texts/s", "tokens/s", "p20 to p80", "speed"]
    return table([*headers, "over the fastest peer"], rows)


def kernels(device: Device) -> str:
    """Ours and the fastest peer of each op, with the share of the roof."""
    rows = []
    for case in device.cases("kernels"):
        ours, best = case.ours, case.best_peer
        if ours is None:
            continue
        share = roof_share(case, ours)
        rows.append(
            [
                f"{case.name}{mark(device, ours)}",
                milliseconds(ours.median),
                f"{case.facts['bytes'] / ours.median / 1e9:,.1f}",
                f"{case.facts['operations'] / ours.median / 1e9:,.0f}",
                "-" if share is None else f"{share[0]:.0%} of {share[1]}",
                speedup(case, best),
                best.contestant if best else "-",
            ]
        )
    headers = ("Op", "ms", "GB/s", "GFLOP/s", "Share of the roof", "over the fastest peer")
    return table([*headers[:2], "gB/s", "gFLOP/s", *headers[4:], "Which is"], rows).replace(
        "gB/s | gFLOP/s", "GB/s | GFLOP/s"
    )


def roof_share(case: Case, row: Row) -> tuple[float, str] | None:
    """How near a kernel comes to the least time that its roofs allow, and which roof that is.

    The roofs are those of its own run: another day's may be higher or lower.
    """
    facts = case.facts
    roofs = case.device.taken[row.suite][case.name].header["roofs"]
    least = roof_seconds(roofs, facts["dtype"], facts["bytes"], facts["operations"])
    return None if least is None else (least[0] / row.median, least[1])


def absent(device: Device) -> Iterator[str]:
    """Who did not run and why, each reason once."""
    seen: dict[tuple[str, str, str], int] = {}
    for suite in device.taken:
        for row in device.rows(suite):
            if row.status != OK:
                status = "" if row.status == SKIPPED else f"**{row.status}**: "
                model = row.facts.get("model", "") if row.ours or status else ""
                who = f"{row.contestant} on {model}" if model else row.contestant
                key = suite, who, status + row.reason
                seen[key] = seen.get(key, 0) + 1
    for (suite, who, reason), count in sorted(seen.items()):
        yield f"- {suite}: {who}, {reason} ({count} case{'s' if count > 1 else ''})"
