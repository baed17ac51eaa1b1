"""The front door: pages are current, links hold, and every command in them is one that the scripts accept."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import COMMANDS, FATES, PAGES, ROOT, commands, fate

from dpo_scale.errors import StoreError
from dpo_scale.settings.tree import load_config

# What is in a bash block and no script of ours: a prefix of the command.
OTHER_PROGRAMS = (
    "pip install ",
    "source .venv/bin/activate",
    "touch runs/",
    "mkdocs build --strict -f docs/site/mkdocs.yml",
)
LAUNCHERS = ("deepspeed", "torchrun", "python")
NEEDS_CLUSTER = ("deepspeed --hostfile", "torchrun --nnodes", "sbatch ")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like a user's checkout, with runs to resume and a file of pairs."""
    for name in ("configs", "launch", "benchmarks", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for run in ("mine", "smollm2-135m-cpu-20260101-000000"):
        checkpoint = tmp_path / "runs" / run / "checkpoints" / "step-200"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "my_pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)


def load(path: Path):
    """A script as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(command: str, monkeypatch) -> None:
    """Raise what the script itself, or this test for it, has to say against the command."""
    if command.startswith(OTHER_PROGRAMS):
        return
    words = shlex.split(command)
    while "=" in words[0]:  # variables set for the command
        del words[0]
    scripts = [
        i for i, word in enumerate(words) if re.fullmatch(r"(launch|benchmarks|tests|docs/site)/\S+\.(py|sh)", word)
    ]
    assert scripts, f"no script of this project in {command!r}"
    script, arguments = Path(words[scripts[0]]), words[scripts[0] + 1 :]
    assert script.is_file(), f"{script}: no such file"
    assert words[0] in (*LAUNCHERS, "bash", "sbatch"), command
    if script.name == "requeue.sh":
        assert arguments[0].isdigit()
        check(shlex.join(arguments[1:]), monkeypatch)
    elif script.name == "slurm.sh":
        load_config(arguments[0], arguments[1:])
    elif script.name == "quickstart.sh":
        assert len(arguments) <= 1
    elif script.parent == Path("launch"):
        run_parser(script, arguments, monkeypatch)
    elif script != Path("tests/run.sh"):  # whose arguments are pytest's
        known = options_of(script)
        for word in arguments:
            assert not word.startswith("--") or word in known, f"{script} has no option {word}"


def run_parser(script: Path, arguments: list[str], monkeypatch) -> None:
    """Let a launch script parse its arguments and read its config, and stop there."""
    module = load(ROOT / script)
    if script.name == "store.py":  # refuses a store that does not exist, once it has understood the rest
        config = argparse.ArgumentParser(allow_abbrev=False)
        config.add_argument("--config")
        known, rest = config.parse_known_args(arguments)
        if known.config is not None:
            load_config(known.config, [word for word in rest if "=" in word], for_training=False)
        monkeypatch.setattr(sys, "argv", [str(script), arguments[0], "no/such/store", *arguments[2:]])
        with pytest.raises(StoreError, match="no such folder"):
            module.main()
        return
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--print-config"])
    try:
        module.main()
    except SystemExit as stopped:
        assert stopped.code in (0, None), f"{script} refuses {arguments}"


@functools.cache
def options_of(script: Path) -> set[str]:
    """Every text that begins with -- in a script of a benchmark or test, or in the Python files beside it."""
    folder = (ROOT / script).parent
    files = [ROOT / script, *folder.glob("*.py")]
    found = set(re.findall(r"--[a-z][a-z-]+", (ROOT / script).read_text())) if script.suffix == ".sh" else set()
    for tree in (ast.parse(file.read_text()) for file in files if file.suffix == ".py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_accepted_by_its_script(command, checkout, monkeypatch, capsys):
    check(command, monkeypatch)


def test_every_documented_command_is_executed_by_a_test_or_said_not_to_be():
    assert [command for command in COMMANDS if fate(command) is None] == []
    used = {fate(command) for command in COMMANDS}
    assert [start for start, where in FATES.items() if where not in used] == []
    tests = {where.split(",")[0] for where in used if where.startswith("tests/")}
    assert [test for test in tests if not (ROOT / test).is_file()] == []


def test_commands_that_need_a_cluster_stand_under_words_that_say_so():
    needing = {command for command in COMMANDS if command.startswith(NEEDS_CLUSTER)}
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert needing and needing == set(commands(page))
    assert "These commands need a cluster" in page


@pytest.mark.parametrize(
    "command",
    [
        "python launch/train.py --config configs/quickstart.yaml train.learning_rat=1",
        "python launch/train.py --config configs/none.yaml",
        "python launch/train.py --confog configs/quickstart.yaml",
        "python launch/trane.py --config configs/quickstart.yaml",
        "python launch/store.py compact STORE --drop-everything",
        "python benchmarks/store.py --quack",
        "bash launch/requeue.sh 10 deepspeed launch/train.py --config configs/quickstart.yaml train.seeds=1",
        "sbatch launch/slurm.sh configs/none.yaml output_dir=runs/x",
        "rm -r runs",
    ],
)
def test_a_command_with_a_mistake_is_found(command, checkout, monkeypatch, capsys):
    with pytest.raises((Exception, SystemExit)):
        check(command, monkeypatch)


def test_yaml_examples_of_data_are_read(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "config.yaml").write_text(block)
    config = load_config(tmp_path / "config.yaml", ["model.path=x"])
    assert [source.weight for source in config.data.train] == [1.0, 0.5, 1.0]


def test_the_settings_page_is_what_the_code_says():
    settings_page = load(ROOT / "docs" / "site" / "settings_page.py")
    assert settings_page.PAGE.read_text() == settings_page.page(), "run: python docs/site/settings_page.py"


def test_the_walk_notices_a_result_that_is_no_longer_what_it_says():
    walk = load(ROOT / "docs" / "site" / "walk.py")
    blocks = ("x = 2\nprint('x is', x / 3)", "x is 0.67"), ("print(x)", "2")
    page = "\n".join(f"```python\n{code}\n```\n\n```text\n{printed}\n```\n" for code, printed in blocks)
    assert walk.differences(page, walk.run(page)) == []
    assert len(walk.differences(page.replace("0.67", "0.70"), walk.run(page))) == 1
    assert len(walk.differences(page.replace("text\n2", "text\n3"), walk.run(page))) == 1
    assert len(walk.differences(page, walk.run(page.replace("print(x)", "pass")))) == 1
    assert walk.run(walk.write(page.replace("0.67", ""), walk.run(page))) == walk.run(page)


def test_the_picture_of_throughput_is_that_of_the_stored_results():
    drawn = load(ROOT / "docs" / "site" / "throughput_picture.py")
    assert drawn.PICTURE.read_text() == drawn.picture(drawn.ratios()), "run: python docs/site/throughput_picture.py"
    text = (ROOT / "README.md").read_text()
    assert "docs/images/throughput.svg" in text
    first, second, *_ = (f"{ratio:.1f}" for _, ratio in drawn.ratios())
    assert f"{second} times as fast as TRL" in text and f"and {first} times" in text


def test_every_option_has_a_meaning():
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 90
    assert [name for name, meaning in rows if not meaning.strip()] == []


def test_the_readme_is_a_door_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300
    targets = [target for target in re.findall(r"\]\(([^)#]+)[)#]", text) if "://" not in target]
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readmes_table_of_trainers_is_part_of_the_one_with_sources():
    def rows(text):
        table = text[text.index("| | dpo_scale | TRL |") :].split("\n\n")[0].splitlines()
        return [re.sub(r"^\| \d+\. ", "| ", line) for line in table]

    readme, with_sources = rows((ROOT / "README.md").read_text()), rows((ROOT / "docs" / "peers.md").read_text())
    assert len(readme) > 8 and set(readme) <= set(with_sources)


def test_every_setting_that_a_page_names_exists():
    known = set(re.findall(r"^\| `(\S+\.\S+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))
    sections = {name.split(".")[0] for name in known}
    for page in PAGES:
        if page.name == "peers.md":  # which names options of other projects
            continue
        for name in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", page.read_text()):
            if name.split(".")[0] in sections and not name.endswith((".yaml", ".jsonl", ".json", ".md", ".py")):
                assert name in known, f"{page.name} names {name}, which is no option"


def test_the_site_builds_strictly(tmp_path):
    # not with --quiet, under which --strict finds nothing
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
        + ["-f", str(ROOT / "docs" / "site" / "mkdocs.yml")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "settings" / "index.html").is_file()
