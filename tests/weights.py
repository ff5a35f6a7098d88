"""How far the weights of two trainings are apart."""


def apart(a, b):
    """The largest, over the tensors of two models (name -> tensor), of |a - b| / |b|: 0 where they are equal.

    Not the largest of an element: where a gradient is nearly zero, its sign is one of rounding, and Adam makes a whole
    step of it.
    """
    assert a.keys() == b.keys()
    gaps = {name: float((a[name].double() - b[name].double()).norm()) for name in a}
    return max(gap / float(b[name].double().norm()) if gap else 0.0 for name, gap in gaps.items())
