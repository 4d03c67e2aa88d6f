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


def test_functions_over_a_screen_are_found_by_their_body_without_docstring():
    def function(name, lines, docstring=""):
        return f"def {name}(\n    a,\n):\n{docstring}" + "    a = 1\n" * lines

    doc = '    """One line.\n\n' + "    more\n" * 9 + '    """\n'
    source = function("long", 8) + function("fits", 7, doc) + function("documented", 8, doc)
    nested = "class A:\n    async def method(self):\n" + "        a = 1\n" * 9
    found = [("long", 8), ("documented", 8), ("method", 9)]
    assert metrics.long_functions(source + nested, limit=7) == found
    assert metrics.long_functions("def empty():\n    pass\n", limit=0) == [("empty", 1)]
    assert metrics.long_functions('def told():\n    """Only this."""\n', limit=0) == []


def test_every_function_of_the_package_fits_on_a_screen():
    assert metrics.functions_over_a_screen() == {}
    assert metrics.functions_over_a_screen(limit=20), "the measure finds nothing at all"


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert metrics.circles(graph) == [["a", "b", "c"]]


def test_the_package_has_no_import_circle():
    graph = metrics.imports()
    assert "trl_apa.algorithms.losses" in graph["trl_apa.algorithms"]
    assert "trl_apa.algorithms.masking" in graph["trl_apa.algorithms.losses"]
    assert metrics.circles(graph) == []


def test_the_walk_from_step_to_the_loss_goes_through_its_stages():
    path = [file for file, _ in metrics.calls_from_step_to_loss()]
    stages = [
        "trainer/apa.py",
        "rollout/batch.py",
        "trainer/experience.py",
        "algorithms/advantages.py",
        "trainer/update.py",
    ]
    assert [path.index(stage) for stage in stages] == sorted(path.index(stage) for stage in stages)
