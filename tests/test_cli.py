"""The command line: what its help teaches, what it refuses and how, and a small run of each new command."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner, Result

from flopwise.cli import app
from flopwise.report import read_records

WORDS = [f"word{i}" for i in range(45)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    """All that was printed, without colours, frames and line breaks."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", result.output)
    return " ".join(plain.split())


@pytest.fixture
def without_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra was not installed: what imports it fails."""
    for name in [name for name in sys.modules if name.startswith("flopwise.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "flopwise.experiments.clustered", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)


@pytest.mark.parametrize(
    ("command", "teaches"),
    [
        ((), ["demo", "tune", "audit", "reproduce", "bench"]),
        (("demo",), ["importance", "clustered", "all that can run here"]),
        (("demo", "importance"), ["--budget", "equal FLOPs"]),
        (("demo", "clustered"), ["--texts", "--clips", "--out", "the ceiling", "Ctrl-C"]),
        (("audit",), ["importance", "before you use it"]),
        (("audit", "importance"), ["MODULE:FUNCTION", "--cost", "--seconds", "--out", "return model,", "at most 0.8"]),
        (("reproduce",), ["--quick", "--full", "pretrained", "stated rule", "Ctrl-C"]),
        (("bench",), ["--out", "two minutes", "processor time"]),
        (("tune",), ["--data", "--tolerance", "--metric", "use_clustered(model, config=", "stays exact"]),
    ],
)
def test_help_teaches(command, teaches):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert not [word for word in teaches if word not in said(result)]


def test_help_needs_neither_transformers_nor_torch_hub():
    code = "import sys; sys.argv = ['flopwise', '--help']; from flopwise.cli import app\n"
    code += "try: app()\nfinally: assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- what is missing ---


@pytest.mark.usefixtures("without_hf")
def test_a_missing_extra_is_one_line(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    for command in (
        ("demo", "clustered", "--out", tmp_path / "out"),
        ("tune", "model", "--data", tmp_path / "texts.txt", "--out", tmp_path / "out"),
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert "pip install 'flopwise[hf]'" in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demos that were asked for; none is run."""
    names: list[str] = []
    for name in ("importance", "attention", "linear", "clustered", "operators"):
        monkeypatch.setattr(f"flopwise.cli.demo_{name}", lambda name=name: names.append(name))
    return names


@pytest.mark.usefixtures("without_hf")
def test_all_demos_leave_out_what_cannot_run(ran):
    result = run("demo")
    assert result.exit_code == 0 and ran == ["attention", "linear", "operators", "importance"]
    assert "Left out: `flopwise demo clustered`" in said(result) and "flopwise[hf]" in result.output


def test_all_demos_run_if_they_can(monkeypatch, ran):
    monkeypatch.setattr("flopwise.cli._clustered_needs", lambda texts, clips: [])
    assert run("demo").exit_code == 0 and ran == ["attention", "linear", "clustered", "importance"]


def test_missing_packages_are_named_with_their_commands(monkeypatch, tmp_path):
    clustered = pytest.importorskip("flopwise.experiments.clustered", reason="the extra `hf` is not installed")
    monkeypatch.setattr(clustered.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(clustered, "PROMPTS", tmp_path / "nowhere")
    with_speech = run("demo", "clustered", "--out", tmp_path / "out")
    assert with_speech.exit_code == 2
    commands = [line for line in with_speech.stderr.splitlines() if line.startswith("    ")]
    assert len(commands) == 4 and commands[-1].startswith("    apt-get install")
    assert all("==" in command for command in commands[:3])
    text_only = run("demo", "clustered", "--clips", 0, "--out", tmp_path / "out")
    assert text_only.exit_code == 2 and text_only.stderr.count("install ") == 2
    assert not (tmp_path / "out").exists()


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("demo", "clustered", "--texts", "3"), "--texts"),
        (("demo", "clustered", "--clips", "-1"), "--clips"),
        (("audit", "importance"), "Missing argument"),
        (("audit", "importance", "no_such_module:setup"), "named module:function, importable from here"),
        (("audit", "importance", "test_cli:an_empty_loader", "--steps", "0"), "yielded nothing"),
        (("audit", "importance", "test_cli:setup", "--cost", "money"), "--cost"),
        (("audit", "importance", "test_cli:setup", "--examples", "3"), "--examples"),
        (("reproduce", "speed"), "a claim is one of importance, attention,"),
        (("reproduce", "--quick", "--full"), "either --quick or --full"),
        (("tune",), "Missing argument"),
        (("tune", "model"), "Missing option '--data'"),
        (("tune", "model", "--data", "nowhere.txt"), "does not exist"),
        (("tune", "model", "--data", __file__, "--tolerance", "1.5"), "above 0 and at most 1; got 1.5"),
        (("tune", "model", "--data", __file__, "--tolerance", "0"), "above 0 and at most 1; got 0"),
        (("tune", "model", "--data", __file__, "--metric", "speed"), "--metric"),
    ],
)
def test_bad_arguments(arguments, complaint):
    result = run(*arguments)
    assert result.exit_code == 2 and complaint in said(result), result.output


# --- audit ---


def setup():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    loss = partial(cross_entropy, reduction="none")
    data = (x, (x[:, :3] * x[:, 3:]).argmax(1))
    return nn.Linear(6, 3), lambda outputs, batch: loss(outputs, batch[1]), [tuple(part[:16] for part in data)]


def an_empty_loader():
    return (*setup()[:2], [])


def test_an_audit_is_printed_recorded_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for count in (1, 2):
        result = run("audit", "importance", "test_cli:setup", "--steps", 3, "--examples", 64)
        assert result.exit_code == 0, result.output
        records = read_records(tmp_path / "audit" / "records.jsonl")
        assert len(records) == count
    assert records[-1]["verdict"] in said(result) and "tau^2" in said(result)
    assert records[-1]["run"]["setup"] == "test_cli:setup" and records[-1]["experiment"] == "audit"
    assert "test_cli:setup: importance sampling is" in (tmp_path / "audit" / "index.html").read_text()


def test_a_setup_in_the_working_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "my_training.py").write_text("from test_cli import setup\n")
    result = run("audit", "importance", "my_training:setup", "--steps", 0, "--examples", 64, "--cost", "seconds")
    assert result.exit_code == 0, result.output


# --- demo clustered ---


def test_an_interrupted_demo_leaves_a_page_and_goes_on(monkeypatch, tmp_path):
    """The runs are made up; what is real is the way from the plan to records, page and verdict."""
    clustered = pytest.importorskip("flopwise.experiments.clustered", reason="the extra `hf` is not installed")
    from flopwise.experiments.runner import Records

    plans = []

    def compare(plan, folder):
        plans.append(plan)
        records = Records(folder)
        for topk in (0, 32):
            made = clustered.Run("text", 64, topk, 512, plan.texts)
            if records.find(made) is not None:
                continue
            times = {"exact": 2.0, "clustered": 1.0}
            found = {"seconds": times, "attention_seconds": times, "cosine": {"mean": 0.995, "min": 0.99}}
            found |= {"length": 512, "examples": plan.texts, "clusters": 64, "topk": topk}
            records.add(made, {"experiment": "clustered", "kind": "text", **found})
            if len(records.all) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(clustered, "compare", compare)
    monkeypatch.setattr(clustered, "missing", lambda plan: [])
    command = ("demo", "clustered", "--texts", 12, "--clips", 0, "--out", tmp_path)
    stopped = run(*command)
    assert stopped.exit_code == 130 and "Stopped." in stopped.output
    assert "1 setting keeps" not in stopped.output and "64 clusters, plain" in (tmp_path / "index.html").read_text()
    ended = run(*command)
    assert ended.exit_code == 0 and "kept the answers in less time" in said(ended)
    assert len(read_records(tmp_path / "records.jsonl")) == 2
    assert (plans[0].texts, plans[0].clips) == (12, 0) and plans[0].lengths == clustered.Plan().lengths


def test_too_many_texts_are_refused(monkeypatch, tmp_path):
    clustered = pytest.importorskip("flopwise.experiments.clustered", reason="the extra `hf` is not installed")

    def compare(plan, folder):
        raise ValueError("the summaries make 90 texts; got 1000, ask for fewer.")

    monkeypatch.setattr(clustered, "compare", compare)
    monkeypatch.setattr(clustered, "missing", lambda plan: [])
    result = run("demo", "clustered", "--texts", 1000, "--out", tmp_path)
    assert result.exit_code == 2 and "ask for fewer" in said(result)


# --- reproduce ---


def test_reproduce_prints_verdicts_and_goes_on_after_an_interruption(monkeypatch, tmp_path):
    """What runs is made up; what is real is the way from the claims to verdicts, records and page."""
    from flopwise.experiments import claims
    from flopwise.experiments.runner import Records

    ran = []

    def run_one(folder, full):
        ran.append(full)
        Records(folder)
        if len(ran) == 1:
            raise KeyboardInterrupt

    for name, claim in claims.CLAIMS.items():
        judgement = claims.Judgement("in part", f"{name} as fast", "it is made up")
        changed = replace(claim, run=run_one, judge=lambda records, j=judgement: j, missing=lambda full: [])
        monkeypatch.setitem(claims.CLAIMS, name, changed)
    command = ("reproduce", "length", "decoding", "--out", tmp_path)
    stopped = run(*command)
    assert stopped.exit_code == 130 and "Stopped." in stopped.output
    ended = run(*command)
    assert ended.exit_code == 0 and "0 of 2 claims reproduced, 2 in part" in said(ended)
    assert "Linear attention costs time" in said(ended) and (tmp_path / "index.html").exists()
    assert [r["claim"] for r in read_records(tmp_path / "records.jsonl")] == ["length", "decoding"]
    monkeypatch.chdir(tmp_path)
    assert run("reproduce", "--full").exit_code == 0 and ran[-6:] == [True] * 6
    assert len(read_records(tmp_path / "reproduced" / "full" / "records.jsonl")) == 6


# --- tune ---


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT of two layers with a tokenizer that knows WORDS."""
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    transformers.BertTokenizer(vocabulary, model_max_length=128).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(" ".join(WORDS[(i + j * j) % 45] for j in range(40)) + "\n" for i in range(8)))
    return path


def test_tune_writes_settings_records_and_page(small_model, texts, tmp_path):
    from flopwise.integrations import transformers as fw

    out = tmp_path / "out"
    for count in (1, 2):
        result = run("tune", small_model, "--data", texts, "--tolerance", "0.5", "--metric", "task", "--out", out)
        assert result.exit_code == 0, result.output
        records = read_records(out / "records.jsonl")
        assert [record["kind"] for record in records].count("tuned") == count
    assert {record["experiment"] for record in records} == {"tune"}
    assert (records[-1]["run"]["data"], records[-1]["metric"]) == ("texts.txt", "task")
    assert records[-1]["verdict"] in said(result)
    config = json.loads((out / "clustered.json").read_text())
    assert config["clustered"] == records[-1]["clustered"]
    assert ("Stay exact" in result.output) == (not config["clustered"])
    assert "<h2>Layer by layer" in (page := (out / "index.html").read_text()) or "is any setting faster" in page
    from transformers import AutoModel

    fw.use_clustered(AutoModel.from_pretrained(small_model), config=out / "clustered.json")


def test_tune_takes_the_model_of_an_installed_package(small_model, texts, tmp_path, monkeypatch):
    package = tmp_path / "site" / "carries_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package that carries a model is not imported')")
    shutil.copytree(small_model, package / "model")
    (package / "model" / "pooling").mkdir()
    (package / "model" / "pooling" / "config.json").write_text("{}")  # as sentence-transformers has it; no model
    monkeypatch.syspath_prepend(package.parent)
    asked = []
    monkeypatch.setattr(
        "flopwise.integrations.tune.tune_texts", lambda model, data, **other: asked.append(model) or _refuse()
    )
    result = run("tune", "carries-a-model", "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "refused" in said(result) and asked == [str(package / "model")]
    shutil.copytree(small_model, package / "other")
    assert "has 2 models" in said(run("tune", "carries-a-model", "--data", texts))


def _refuse():
    raise ValueError("refused")


def test_tune_says_what_is_wrong_with_model_or_texts(small_model, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("tune", tmp_path / "nowhere", "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "nowhere" in said(result).replace(" ", "")
    texts.write_text("one\n")
    result = run("tune", small_model, "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "has 1." in said(result)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_tune_leaves_what_was_there_and_a_page_of_what_it_saw(small_model, texts, tmp_path, monkeypatch):
    def interrupted(*arguments, note, seen, **keywords):
        for length in seen:
            note({"kind": "timing", "clusters": None, "topk": None, "length": length, "seconds": 0.1})
        raise KeyboardInterrupt

    monkeypatch.setattr("flopwise.integrations.tune.tune_texts", partial(interrupted, seen=()))
    result = run("tune", small_model, "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Stopped." in result.output and not (tmp_path / "out").exists()

    monkeypatch.setattr("flopwise.integrations.tune.tune_texts", partial(interrupted, seen=(64, 128)))
    result = run("tune", small_model, "--data", texts, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "seen so far" in said(result)
    assert "has not ended" in (tmp_path / "out" / "index.html").read_text()
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 2
    assert not (tmp_path / "out" / "clustered.json").exists()
