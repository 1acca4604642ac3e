"""Every element's state has one place, within a page, where vector instructions and 8-bit blocks like it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.optim.pages import ALIGNMENT, LAYOUTS, PageTable


@given(
    bits=st.sampled_from([32, 8]),
    pages=st.integers(1, 4),
    counts=st.lists(st.integers(0, 5000), max_size=20),
)
def test_segments_cover_every_parameter_and_never_overlap(bits, pages, counts):
    layout = LAYOUTS[bits]
    table = PageTable(layout, pages * 4096)
    numbers = [table.add(count) for count in counts]
    assert numbers == list(range(len(counts)))
    for number, count in enumerate(counts):
        segments = table.of_parameter[number]
        edges = [0, *(s.stop for s in segments)]
        assert [s.start for s in segments] == edges[:-1] and edges[-1] == count
        assert all(s.start % layout.quantum == 0 and s.offset % ALIGNMENT == 0 for s in segments)
        assert all(s.whole == (len(segments) == 1) for s in segments)
    for page, segments in enumerate(table.of_page):
        end = 0
        for segment in segments:
            assert segment.page == page and segment.offset >= end
            end = segment.offset + layout.bytes(segment.stop - segment.start)
        assert end <= table.page_bytes


@given(bits=st.sampled_from([32, 8]), counts=st.lists(st.integers(1, 3000), max_size=12))
def test_views_of_a_page_do_not_share_memory(bits, counts):
    table = PageTable(LAYOUTS[bits], 8192)
    for count in counts:
        table.add(count)
    for segments in table.of_page:
        page = torch.zeros(8192, dtype=torch.uint8)
        total = 0
        for segment in segments:
            for view in segment.views(page, table.layout):
                assert not view.view(torch.uint8).any()
                view.view(torch.uint8).fill_(1)
                total += view.numel() * view.element_size()
        assert page.sum() == total


def test_small_parameters_share_pages():
    table = PageTable(LAYOUTS[32], 1 << 20)
    for _ in range(200):
        table.add(576)
    assert len(table) == 1 and table.state_bytes == 200 * 576 * 8


@pytest.mark.parametrize(("bits", "bytes_per_element"), [(32, 8), (8, 2 + 8 / 256)])
def test_large_parameters_waste_little(bits, bytes_per_element):
    table = PageTable(LAYOUTS[bits], 1 << 20)
    table.add(10_000_000)
    assert len(table) * table.page_bytes < 10_000_000 * bytes_per_element * 1.01 + table.page_bytes
