"""The spill file is private, has its room from the start, leaves nothing behind, and never gives back wrong data."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from optim_cases import PAGE, parameters, set_gradients, train
from processes import run_process

from minipeft import PagedAdamW
from minipeft.optim import PagingError
from minipeft.optim.tiers import SpillFile


def paged(params, directory, **settings):
    return PagedAdamW(params, page_bytes=PAGE, host_budget=3 * PAGE, spill_dir=directory, **settings)


def spill_of(optimizer):
    return optimizer.pages.pager.tiers[-1]


def test_file_is_private_nameless_and_allocated_at_once(tmp_path):
    optimizer = paged(parameters(), tmp_path)
    status = os.fstat(spill_of(optimizer)._handle)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
    assert status.st_blocks * 512 >= spill_of(optimizer).slots * PAGE > 0
    assert list(tmp_path.iterdir()) == []


def test_file_is_closed_with_the_optimizer(tmp_path):
    optimizer = paged(parameters(), tmp_path)
    handle = spill_of(optimizer)._handle
    optimizer.close()
    with pytest.raises(OSError):
        os.fstat(handle)


def test_full_disk_is_known_at_the_start(tmp_path, monkeypatch):
    def full(handle, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def files():
        return {os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")}

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = rf"cannot have [\d,]+ bytes in spill_dir {tmp_path}.*No space left.*[\d,]+ bytes are free there"
    with pytest.raises(PagingError, match=message):
        paged(parameters(), tmp_path)
    assert not any(str(tmp_path) in name for name in files())


@pytest.mark.parametrize("where", ["missing", "file"])
def test_directory_that_is_none_is_an_error(tmp_path, where):
    directory = tmp_path / where
    if where == "file":
        directory.write_text("")
    with pytest.raises(PagingError, match=f"cannot create a file in spill_dir {directory}: N"):
        paged(parameters(), directory)


def corrupt(spill):
    """Change a bit of every page, in whole aligned pages, as a direct file wants it."""
    memory = torch.zeros(2 * PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    page = memory[start : start + PAGE].numpy().data
    for slot in range(spill.slots):
        os.preadv(spill._handle, [page], slot * PAGE)
        page[100] ^= 1
        os.pwrite(spill._handle, page, slot * PAGE)


def cut(spill):
    os.ftruncate(spill._handle, 0)


CORRUPT = r"page \d+ of the optimizer state, at byte [\d,]+ of the spill file in .* is corrupt"
SHORT = r"cannot read page \d+ .*: it ends after 0 of 4096 bytes"


# A page that is written behind the cut makes the file longer again: then there are zeros before it.
@pytest.mark.parametrize(("damage", "message"), [(corrupt, CORRUPT), (cut, f"{SHORT}|{CORRUPT}")])
def test_damage_is_an_error_that_names_the_page(tmp_path, damage, message):
    params = parameters()
    optimizer = paged(params, tmp_path)
    train(optimizer, params, 2, missing=0)
    damage(spill_of(optimizer))
    with pytest.raises(PagingError, match=message):
        train(optimizer, params, 2, missing=0)
    for act in (optimizer.state_dict, optimizer.step):
        set_gradients(0, params, missing=0)
        with pytest.raises(PagingError, match="checkpoint"):
            act()


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_failing_disk_is_an_error_that_names_the_page(tmp_path, monkeypatch, call):
    params = parameters()
    optimizer = paged(params, tmp_path)
    train(optimizer, params, 1, missing=0)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    verb = {"preadv": "read", "pwrite": "write"}[call]
    with pytest.raises(PagingError, match=rf"cannot {verb} page \d+ .*: Input/output error"):
        train(optimizer, params, 2, missing=0)


def test_transfers_in_pieces_are_put_together(tmp_path, monkeypatch):
    pieces, unit = 4, PAGE
    spill = SpillFile("disk", 2, pieces * unit, tmp_path)
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: write(handle, data[:unit], offset))
    monkeypatch.setattr(os, "preadv", lambda handle, data, offset: read(handle, [data[0][:unit]], offset))
    memory = torch.randint(0, 255, (3 * pieces * unit,), dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    page, back = memory[start:].split(pieces * unit)[:2]
    spill.put(1, 0, page)
    spill.get(1, 0, back)
    assert torch.equal(page, back)
    spill.close()


def test_killed_process_leaves_nothing_and_a_limited_one_knows_it_at_the_start(tmp_path):
    code = f"""
import os, resource, signal, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from test_spill import PagingError, paged, parameters, train
params = parameters()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
try:
    paged(params, {str(tmp_path)!r})
    raise SystemExit("a file larger than the limit was thought to be there")
except PagingError as error:
    assert "cannot have" in str(error), error
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
optimizer = paged(params, {str(tmp_path)!r})
train(optimizer, params, 3)
assert optimizer.memory_stats()["page_outs"] > 0
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == -9 and not done.stderr and list(tmp_path.iterdir()) == []
