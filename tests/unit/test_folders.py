"""Whether the ranks share a folder, and who tokenizes for whom. Real machines that do not: tests/nodes."""

import errno
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from dpo_scale.distributed import folders, ranks
from dpo_scale.distributed.folders import require_shared, sees_folder_of_main
from dpo_scale.errors import ConfigError
from dpo_scale.settings.tree import Config
from dpo_scale.training import prepare


@pytest.fixture
def two_machines(monkeypatch):
    """This process is rank 0 of two, on two machines; what the other would answer is in `other`."""
    other = SimpleNamespace(machine="another", sees=True, host="node-b")

    def gather(value, group=None):
        if isinstance(value, bool):
            return [value, other.sees]
        return [value, other.machine if value == folders.machine_id() else other.host]

    monkeypatch.setattr(ranks, "gather_objects", gather)
    monkeypatch.setattr(ranks, "from_main", lambda value, group=None: value)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    return other


def test_a_folder_that_another_machine_does_not_see_is_refused_by_name(two_machines, tmp_path):
    require_shared(tmp_path / "run", "output_dir")
    two_machines.sees = False
    with pytest.raises(ConfigError, match=r"^output_dir = '.*run': not the same folder on node-b as on .*rank 1"):
        require_shared(tmp_path / "run", "output_dir")
    assert list((tmp_path / "run").iterdir()) == [], "the file that they looked for is gone"


def test_ranks_of_one_machine_share_every_folder_without_a_file(two_machines, tmp_path):
    two_machines.machine = folders.machine_id()
    assert sees_folder_of_main(tmp_path / "new") == [True, True]
    assert not (tmp_path / "new").exists()


def test_a_store_that_may_only_be_read_is_left_unchecked(two_machines, tmp_path, monkeypatch):
    def refused(folder, wait_seconds):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folders, "sees_folder_of_main", refused)
    require_shared(tmp_path, "reference.store", may_be_read_only=True)
    with pytest.raises(ConfigError, match="cannot be written: Read-only file system"):
        require_shared(tmp_path, "output_dir")


@pytest.mark.parametrize(
    ("seen", "rank", "local_rank", "first"),
    [
        ([True, True, True], 0, 0, True),
        ([True, True, True], 2, 0, False),  # the first of another machine finds what rank 0 left
        ([True, True, False], 2, 0, True),  # its machine has a cache of its own
        ([True, True, False], 1, 1, False),
    ],
)
def test_one_rank_tokenizes_into_a_cache_that_all_share_else_one_a_machine(
    tmp_path, monkeypatch, seen, rank, local_rank, first
):
    monkeypatch.setattr(prepare, "sees_folder_of_main", lambda folder, seconds: seen)
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "local_rank", lambda: local_rank)
    assert prepare.tokenizes_first(tmp_path) is first


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_lists_bad_rows(tmp_path, monkeypatch, rank):
    lists = []
    tokenizer, model_config = object(), tiny_config("llama")
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(prepare, "load_tokenizers", lambda config: (tokenizer, model_config))
    monkeypatch.setattr(prepare, "check_vocabulary", lambda *arguments: None)
    monkeypatch.setattr(prepare, "resolve_layout", lambda config: None)
    monkeypatch.setattr(prepare, "load_pairs", lambda *_, report_dir, **more: lists.append(report_dir))
    prepare.prepare(Config(), report_dir=tmp_path)
    assert lists == [tmp_path if rank == 0 else None]
