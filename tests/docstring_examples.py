"""The examples of docstrings, run as a reader would."""
import doctest


def check_example(function, names):
    """Run the example of a function's docstring with these names at hand; it must have one, and give what it shows."""
    example, = doctest.DocTestFinder(recurse=False).find(function, function.__name__, module=False, globs=names)
    said = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried
    assert not failed, "".join(said)
