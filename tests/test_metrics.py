"""`make metrics`: what it counts, on classes and modules made for it; and what of it the package keeps."""

import ast

from benchmarks import metrics


def parts(*sources):
    nodes = [node for source in sources for node in ast.parse(source).body]
    return {node.name: node for node in nodes}


def test_changes_of_file_are_counted_not_calls():
    assert metrics.changes(["a", "a", "b", "b", "a"]) == ["a", "b", "a"]


def test_private_names_of_another_class_and_attributes_with_two_writers_are_found():
    made = parts(
        "class A:\n  _shared: int\n  def f(self):\n    self._own = 1\n    self.both = self._own + self._shared",
        "class B:\n  def g(self):\n    self.both = self._own\n    self._unknown_to_all",
    )
    assert metrics.inherited_privates(made) == {"B": ["_own"]}
    assert metrics.several_writers(made) == {"both": ["A", "B"]}


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert metrics.circles(graph) == [["a", "b", "c"]]


def test_the_package_has_no_import_circle():
    graph = metrics.imports()
    assert "trl_apa.algorithms.losses" in graph["trl_apa.algorithms"]
    assert "trl_apa.algorithms.masking" in graph["trl_apa.algorithms.losses"]
    assert metrics.circles(graph) == []


def test_the_walk_from_step_to_the_loss_goes_through_its_stages():
    path = metrics.files_from_step_to_loss()
    stages = [
        "trainer/apa.py",
        "rollout/batch.py",
        "trainer/experience.py",
        "algorithms/advantages.py",
        "trainer/update.py",
    ]
    assert [path.index(stage) for stage in stages] == sorted(path.index(stage) for stage in stages)
