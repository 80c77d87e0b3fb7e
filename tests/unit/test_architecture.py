"""The rooms of the package: no circles, and a picture of them that is current."""

import networkx as nx

from tests.architecture import draw_rooms, find_rooms, read_picture


def test_no_rooms_import_each_other() -> None:
    assert nx.is_directed_acyclic_graph(find_rooms())


def test_the_picture_of_the_rooms_is_current() -> None:
    assert read_picture() == draw_rooms(), "python -m tests.architecture draws it anew"
