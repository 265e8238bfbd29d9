"""The README and docs/: every block of Python runs, pairs agree, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import em_kernels
from em_kernels import tiny_math

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
GIVEN, INSTEAD = "# given this\n", "# do this instead\n"
RESULTS = ("logprob", "entropy", "loss")


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text())


PAIRS = [
    pytest.param(given, instead, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, (given, instead) in enumerate(zip(blocks(path), blocks(path)[1:]))
    if given.startswith(GIVEN) and instead.startswith(INSTEAD)
]
ALONE = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, block in enumerate(blocks(path))
    if not block.startswith((GIVEN, INSTEAD))
]


@pytest.fixture
def names(tmp_path) -> dict:
    """What the blocks take as given."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_math.model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained
    tokens = torch.randint(0, 50, (2, 6))
    return {
        "T": 0.7,
        "model": model,
        "ids": tokenizer(folder)([tiny_math.PROMPT], return_tensors="pt")["input_ids"],
        "tokens": tokens,
        "logits": torch.randn(2, 6, 50, requires_grad=True),
        "hidden": torch.randn(2, 6, 8, requires_grad=True),
        "weight": torch.randn(50, 8, requires_grad=True),
        "a": torch.randn(3, 8),
        "b": torch.randn(50, 3),
        "teacher_hidden": torch.randn(2, 6, 12),
        "teacher_weight": torch.randn(50, 12),
        "advantage": torch.randn(2, 6),
        "mask": (torch.arange(12).view(2, 6) % 4 > 0).float(),
    }


def run(code: str, names: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results that a block leaves, and the gradients of what it was given."""
    leaves = {name: names[name] for name in ("logits", "hidden", "weight")}
    for leaf in leaves.values():
        leaf.grad = None
    made = dict(names)
    exec(code, made)
    results = {name: made[name].detach() for name in RESULTS if name in made}
    return results, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_the_readme_is_one_screen_with_three_pairs():
    assert len(README.read_text().splitlines()) <= 130
    assert [block.startswith(GIVEN) for block in blocks(README)] == [True, False] * 3


@pytest.mark.parametrize("given, instead", PAIRS)
def test_both_of_a_pair_give_the_same(given, instead, names):
    expected, gradients = run(given, names)
    actual, made = run(instead, names)
    shared = expected.keys() & actual.keys()
    assert shared and gradients.keys() == made.keys()
    for name in shared:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    for name in gradients:
        torch.testing.assert_close(made[name], gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_every_block_of_a_pair_has_its_other_half():
    for path in PAGES:
        kinds = [block.partition("\n")[0] + "\n" for block in blocks(path)]
        halves = [kind for kind in kinds if kind in (GIVEN, INSTEAD)]
        assert halves == [GIVEN, INSTEAD] * (len(halves) // 2), path.name


def test_the_blocks_of_the_objectives_run_in_turn_with_nothing_given():
    given: dict = {}
    for block in blocks(ROOT / "docs/guide/objectives.md"):
        exec(block, given)


@pytest.mark.parametrize("block", ALONE)
def test_every_other_block_runs(block, names, tmp_path):
    pytest.importorskip("trl")
    from transformers import TrainingArguments

    rows = [{"input_ids": names["ids"][0], "labels": names["ids"][0]}] * 2
    options = dict(max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    args = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **options)
    logprob = torch.randn(2, 6)
    more = dict(my_rows=names["weight"], group=None, logprob=logprob, args=args, dataset=rows)
    exec(block, {**names, **more})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        picture = ROOT / "benchmarks/results" / Path(target).name  # docs/hooks.py puts it in
        assert (path.parent / target).exists() or (
            target.startswith("images/") and picture.exists()
        ), target


ROOMS = [path.parent.name for path in (ROOT / "em_kernels").glob("*/__init__.py")]


def test_files_that_are_named_exist():
    """`examples/...`, `benchmarks/...`, and by its room `backends/...` in the prose."""
    places = ("em_kernels", "examples", "benchmarks", "tests", "csrc", "docs", *ROOMS)
    pattern = rf"`((?:{'|'.join(places)})/[\w./-]*[\w/])`"
    for path in [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(pattern, path.read_text()):
            place = ROOT / "em_kernels" if name.split("/")[0] in ROOMS else ROOT
            assert (place / name).exists() or (ROOT / name).exists(), f"{path.name} names {name}"


def test_every_output_and_public_name_is_on_its_page():
    """The guide lists what there is; the API page is made of `__all__`."""
    text = (ROOT / "docs/guide/statistics.md").read_text()
    listed = text.partition("Statistics: ")[2].partition(". Only")[0]
    assert re.findall(r"`(\w+)`", listed) == list(em_kernels.TokenStats._fields)
    results = {"TokenDivergence", "TokenLoss", "TokenStats", "TopLogprobs"}
    results |= {"WeightedDivergence"}
    public = set(em_kernels.__all__) - results
    assert {name for name in public if f"`{name}" not in text and f".{name}(" not in text} == set()


def test_the_api_shows_what_decorators_add():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / "docs/signatures.py"))
    package = griffe.load("em_kernels", search_paths=[ROOT], extensions=extensions)
    config, loss = package["trainer.config.TrainConfig"], package["ops.token_loss.EntropyLoss"]
    assert config.parameters["updates"].default == "10"
    assert "updates: optimiser updates in all" in config.docstring.value
    assert loss.parameters["temperature"].default == "1.0"
    assert "\n    temperature: positive" in loss.members["__init__"].docstring.value
