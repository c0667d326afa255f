"""Drawn calls of the losses: info_nce, distillation, siglip, triplet and linear_cross_entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from tests.distillation import cases as distillation_cases
from tests.fuzz.calls import Leaf, assert_no_wrong_number, check_call
from tests.fuzz.draw import NOT_FINITE, Draw
from tests.info_nce import cases as info_nce_cases
from tests.linear_cross_entropy import cases as linear_cross_entropy_cases
from tests.siglip import cases as siglip_cases
from tests.triplet import cases as triplet_cases

QUEUES = ("key_queue", "query_queue")
REDUCTIONS = ("none", "mean", "sum")
SCALES = (0.0, 1.0, 5.0, 10.0, 14.3, 20.0, 100.0, -5.0, 1e-3)
SIDES = (0.0, 0.3, 0.95, -0.2)  # mean cosines of a query and its key


def pairs(draw: Draw, dtype: torch.dtype, n: int, m: int, of: str = "") -> tuple[Tensor, Tensor]:
    """Queries [n, D] and keys [m, D]."""
    size = draw.size(f"{of}D", 140)
    queries, like, near = draw.rows(f"{of}queries", n, size, dtype), None, 0.0
    if draw.chance(f"{of}near", 0.7):
        like, near = queries, draw.pick(f"{of}mean cosine", SIDES)
    return queries, draw.rows(f"{of}keys", m, size, dtype, like=like, near=near)


def scalar(draw: Draw, name: str, value: float) -> tuple[float | Tensor, bool]:
    """A number as callers pass it, and whether a gradient may flow to it."""
    kind = draw.pick(f"{name} is", ["a float", "a tensor", "a tensor", "a tensor [1]", "of float64"])
    if kind == "a float":
        return value, False
    dtype = torch.float64 if kind == "of float64" else torch.float32
    return torch.full((1,) if kind == "a tensor [1]" else (), value, dtype=dtype), True


def group_ids(draw: Draw, n: int, m: int, matched: list[int]) -> dict[str, Tensor]:
    """Ids of queries and keys: each query has a key of its group, each matched key a query."""
    generator = draw.generator()
    ids = torch.randint(-(2**62), 2**62, (min(n, m, draw.size("groups", 64)),), generator=generator).unique()
    places = [
        torch.cat([torch.arange(len(ids)), torch.randint(len(ids), (rows - len(ids),), generator=generator)])
        for rows in (n, m)
    ]
    of_queries, of_keys = (ids[place[torch.randperm(len(place), generator=generator)]] for place in places)
    for j in set(range(m)) - set(matched):  # some of the others are of no query's group
        if draw.random.random() < 0.3 and (of_keys == of_keys[j]).sum() > 1:
            of_keys[j] = 2**62 + draw.random.randrange(3)
    return {"query_groups": of_queries, "key_groups": of_keys}


def largest_product(*rows: Tensor) -> float:
    """A bound of the products of rows [..., D] of two kinds."""
    longest = [x.double().norm(dim=-1).max().item() if len(x) else 0.0 for x in rows]
    return longest[0] * max(longest[1:])


def of_probabilities(logits: float) -> float:
    """By how much the error of a probability exceeds that of a number: the error of its logit is a relative one."""
    return max(1.0, logits / 4)


def of_cross_entropy(draw: Draw, count: int, logits: float) -> float:
    """The size of what a cross-entropy over ``count`` classes is a difference of: logits, and the logarithm of a sum,
    in which that sum's relative error is an absolute one."""
    return max(draw.alike(count) * logits, draw.of_equal_terms(count))


def weights_of_rows(draw: Draw, n: int) -> Tensor:
    dtype = draw.pick("dtype of weights", [torch.float32, torch.float64, torch.bfloat16])
    weights = torch.rand(n, generator=draw.generator()) + 0.1
    if n > 1 and draw.chance("a weight of 0", 0.3):
        weights[draw.random.randrange(n)] = 0
    return weights.to(dtype)


def coefficient(reduction: str, n: int, weights: Tensor | None) -> float:
    """The largest share that a row's loss has in the result, times the weight of 1.5 that it may get."""
    own = torch.ones(n) if weights is None else weights.double()
    return 1.5 * (own.max() / (own.sum() if reduction == "mean" else 1)).item()


def plant_in_pairs(
    draw: Draw, queries: Tensor, keys: Tensor, kinds: Sequence[float] = NOT_FINITE
) -> tuple[Tensor, Tensor]:
    if draw.chance("in queries", 0.5):
        return draw.plant("queries", queries, kinds), keys
    return queries, draw.plant("keys", keys, kinds)


def weights_on(rows: Tensor, columns: Tensor | None, targets: Tensor) -> tuple[float, float]:
    """The largest sums of the terms of a query's gradient and of a key's, as multiples of one row's and its match's.

    ``rows`` [N, M] are probabilities and targets of each query, ``columns`` [N, N] of each matched key.
    """
    on_queries, on_keys = rows.sum(1), rows.sum(0)
    if columns is not None:
        on_queries = (on_queries + columns.sum(0)[: len(rows)]) / 2
        on_keys = on_keys.index_add(0, targets, columns.sum(1)) / 2
    return max(1.0, on_queries.max().item() / 2), max(1.0, on_keys.max().item() / 2)


def weights_of_info_nce(queries: Tensor, keys: Tensor, scale: float, options: dict[str, Any]) -> tuple[float, float]:
    q, k = queries.double(), keys.double()
    all_keys, all_queries = (
        torch.cat([x, options.get(name, x[:0]).double()]) for name, x in zip(QUEUES, (k, q), strict=True)
    )
    targets = options.get("targets", torch.arange(len(q)))
    of_rows, of_columns = F.one_hot(targets, len(k)).double(), torch.eye(len(q), dtype=torch.float64)
    if "query_groups" in options:
        of_rows = (options["query_groups"][:, None] == options["key_groups"]).double()
        of_columns = of_rows.T[targets]
    parts = []
    for matches, logits in ((of_rows, q @ all_keys.T), (of_columns, k[targets] @ all_queries.T)):
        expected = F.pad(matches / matches.sum(1, keepdim=True), (0, logits.shape[1] - matches.shape[1]))
        parts.append((scale * logits).softmax(1) + expected)
    return weights_on(parts[0], parts[1] if options.get("symmetric", True) else None, targets)


def info_nce(draw: Draw) -> None:
    dtype, n, m = draw.dtype(), draw.size("N", 260), draw.size("M", 260)
    queries, keys = pairs(draw, dtype, n, m)
    scale = draw.pick("scale", SCALES)
    options: dict[str, Any] = {}
    targets = None
    if n > m or draw.chance("targets", 0.3):
        options["targets"] = targets = torch.randint(m, (n,), generator=draw.generator())
    if draw.chance("rows alone", 0.3):
        options["symmetric"] = False
    if draw.chance("smoothing", 0.3):
        options["label_smoothing"] = draw.pick("label_smoothing", [0.1, 0.5, 1.0, 1e-6])
    if draw.chance("grouped", 0.3):
        options |= group_ids(draw, n, m, list(range(n)) if targets is None else targets.tolist())
    if draw.chance("with key_queue", 0.3):
        options["key_queue"] = draw.rows("key_queue", draw.size("Q", 140), queries.shape[1], dtype)
    if options.get("symmetric", True) and draw.chance("with query_queue", 0.2):
        options["query_queue"] = draw.rows("query_queue", draw.size("R", 140), queries.shape[1], dtype)

    everything = [queries, keys, *(options[name] for name in QUEUES if name in options)]
    product = max(largest_product(queries, *everything[1:]), largest_product(keys, *everything[1:]))
    of_loss = of_cross_entropy(draw, sum(map(len, everything)), abs(scale) * product)
    planted = draw.chance("planted", 0.15)
    if planted:
        queries, keys = plant_in_pairs(draw, queries, keys)
    # Of targets that are shares, torch's cross-entropy multiplies logits of -inf by 0: the reference leaves them out.
    shares = "query_groups" in options or "label_smoothing" in options
    results = (
        info_nce_cases.run(queries, keys, scale, "cpu", **options),
        info_nce_cases.run(queries, keys, scale, "reference", **options)
        if planted and shares
        else info_nce_cases.run_eager(queries, keys, scale, **options),
        info_nce_cases.run(queries.double(), keys.double(), scale, "reference", **options),
    )
    if planted:
        assert_no_wrong_number(*results, dtype, of_loss)
        return
    on_queries, on_keys = weights_of_info_nce(queries, keys, scale, options)
    largest = max(x.double().abs().max().item() for x in everything)
    of_features = abs(scale) * largest * of_probabilities(abs(scale) * product)
    of_scale = 2 * n**0.5 * product
    of_gradients = [on_queries * of_features, on_keys * of_features, of_scale]
    terms = [of_loss, *(draw.alike(max(n, m)) * size for size in of_gradients)]
    info_nce_cases.assert_results(*results, queries, keys, scale, terms)

    weights = weights_of_rows(draw, n) if draw.chance("weights", 0.4) else None
    reduction, (logit_scale, learns) = draw.pick("reduction", REDUCTIONS), scalar(draw, "logit_scale", scale)
    share = coefficient(reduction, n, weights)
    leaves = [Leaf("queries", queries, share * terms[1]), Leaf("keys", keys, share * terms[2])]
    if learns:
        leaves.append(Leaf("logit_scale", logit_scale, share * terms[3]))
    of_queues = share * max(terms[1:3])
    leaves += [Leaf(name, options.pop(name), of_queues) for name in QUEUES if name in options]
    if weights is not None:
        leaves.append(of_weights(weights, results[2][0], terms[0], reduction))
    names = [leaf.name for leaf in leaves]

    def call(impl: str, *tensors: Tensor) -> Tensor:
        arguments = {"logit_scale": scale} | dict(zip(names, tensors, strict=True)) | options
        return mmkernels.info_nce(**arguments, reduction=reduction, impl=impl)

    check_call(draw, call, leaves, dtype, share * terms[0] * (1 if reduction == "none" else n))


def of_weights(weights: Tensor, losses: Tensor, of_loss: float, reduction: str) -> Leaf:
    """The gradient to a weight is its row's loss, as exact as that: ``of_loss`` is the size of what losses are a
    difference of. Under a weighted mean it is the loss's difference from the mean."""
    largest = max(losses.abs().max().item(), of_loss)
    return Leaf("weights", weights, largest if reduction != "mean" else 2 * largest / weights.double().sum().item())


def distillation(draw: Draw) -> None:
    dtype, n = draw.dtype(), draw.size("N", 260)
    symmetric = draw.chance("symmetric", 0.6)
    m = n if symmetric else draw.size("M", 260)
    student = pairs(draw, dtype, n, m)
    inputs = (*student, *pairs(draw, dtype, n, m, "teacher_"))
    scale, teacher_scale = draw.pick("scale", SCALES), draw.pick("teacher_scale", SCALES)
    options = (scale, teacher_scale, symmetric)
    # A target is e^(x - lse): its relative error is that of the teacher's logits.
    sharp = 1 + abs(teacher_scale) * largest_product(*inputs[2:])
    product = largest_product(*student)
    of_loss = of_cross_entropy(draw, max(n, m), sharp * abs(scale) * product)
    planted = draw.chance("planted", 0.15)
    if planted:
        where = draw.pick("planted in", range(4))
        inputs = tuple(draw.plant("planted", x) if i == where else x for i, x in enumerate(inputs))
    results = (
        distillation_cases.run(inputs, *options, "cpu"),
        distillation_cases.run(inputs, *options, "eager"),
        distillation_cases.run(tuple(x.double() for x in inputs), *options, "reference"),
    )
    if planted:
        (distilled, _, *a), (eager, _, *b), (exact, _, *c) = results
        assert_no_wrong_number([distilled, *a], [eager, *b], [exact, *c], dtype, of_loss)
        return
    q, k, teacher_q, teacher_k = (x.double() for x in inputs)
    logits, teacher = scale * q @ k.T, teacher_scale * teacher_q @ teacher_k.T
    weights_of_both = weights_on(
        logits.softmax(1) + teacher.softmax(1) + torch.eye(n, m),
        logits.T.softmax(1) + teacher.T.softmax(1) + torch.eye(m, n) if symmetric else None,
        torch.arange(n),
    )
    largest = [x.abs().max().item() for x in (k, q)]
    of_features = 2 * (sharp + of_probabilities(abs(scale) * product)) * abs(scale)
    of_gradients = [of_features * on * x for on, x in zip(weights_of_both, largest, strict=True)]
    of_gradients.append(2 * sharp * n**0.5 * product)
    terms = [of_loss, of_loss, *(draw.alike(max(n, m)) * size for size in of_gradients)]
    distillation_cases.assert_results(*results, inputs, scale, terms)

    weights = weights_of_rows(draw, n) if draw.chance("weights", 0.4) else None
    reduction, (logit_scale, learns) = draw.pick("reduction", REDUCTIONS), scalar(draw, "logit_scale", scale)
    share = coefficient(reduction, n, weights)
    leaves = [Leaf("queries", inputs[0], share * terms[2]), Leaf("keys", inputs[1], share * terms[3])]
    if learns:
        leaves.append(Leaf("logit_scale", logit_scale, share * terms[4]))
    if weights is not None:
        leaves.append(of_weights(weights, results[2][0], terms[0], reduction))
    names = [leaf.name for leaf in leaves]

    def call(impl: str, *tensors: Tensor) -> Tensor:
        teacher = [x.to(tensors[0].dtype) for x in inputs[2:]]
        arguments = {"logit_scale": scale} | dict(zip(names, tensors, strict=True))
        arguments |= {"teacher_queries": teacher[0], "teacher_keys": teacher[1], "teacher_scale": teacher_scale}
        return mmkernels.distillation(**arguments, symmetric=symmetric, reduction=reduction, impl=impl)

    check_call(draw, call, leaves, dtype, share * terms[0] * (1 if reduction == "none" else n))


def siglip(draw: Draw) -> None:
    dtype, n = draw.dtype(), draw.size("N", 260)
    m = draw.size("M", 300, least=n)
    queries, keys = pairs(draw, dtype, n, m)
    scale, bias, reduction = (
        draw.pick("scale", SCALES),
        draw.pick("bias", [0.0, -10.0, 5.0, -16.5]),
        draw.pick("reduction", REDUCTIONS),
    )
    planted = draw.chance("planted", 0.15)
    if planted:
        queries, keys = plant_in_pairs(draw, queries, keys)
    actual = siglip_cases.run(queries, keys, scale, bias, "cpu", reduction)
    eager, exact = siglip_cases.oracles(queries, keys, scale, bias, reduction)
    if planted:
        assert_no_wrong_number(actual, eager, exact, dtype)
        return
    # Sizes are those of one pair: a sum of equal ones is that many times it, and is added in float32 in any dtype.
    count = max(n, m)
    in_float32 = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    alike = max(draw.alike(count), in_float32 * count * draw.of_equal_terms(count))
    siglip_cases.assert_results(actual, eager, exact, queries, keys, scale, bias, reduction, alike)

    (logit_scale, scale_learns), (logit_bias, bias_learns) = (
        scalar(draw, "logit_scale", scale),
        scalar(draw, "logit_bias", bias),
    )
    q, k = queries.double(), keys.double()
    products = q @ k.T
    grads = (torch.sigmoid(scale * products + bias) - torch.eye(n, m)).abs() * alike * coefficient(reduction, n, None)
    one = grads.max().item() * abs(scale)
    leaves = [Leaf("queries", queries, one * k.abs().max().item()), Leaf("keys", keys, one * q.abs().max().item())]
    if scale_learns:
        leaves.append(Leaf("logit_scale", logit_scale, (grads * products.abs()).sum().item()))
    if bias_learns:
        leaves.append(Leaf("logit_bias", logit_bias, grads.sum().item()))
    names = [leaf.name for leaf in leaves]

    def call(impl: str, *tensors: Tensor) -> Tensor:
        arguments = {"logit_scale": scale, "logit_bias": bias} | dict(zip(names, tensors, strict=True))
        return mmkernels.siglip(**arguments, reduction=reduction, impl=impl)

    check_call(draw, call, leaves, dtype)


def triplet(draw: Draw) -> None:
    """Features are small multiples of 1/4, as in the op's own cases: no rounding decides which negative is worst."""
    dtype, n = draw.dtype(), draw.size("N", 260)
    m, size = draw.size("M", 300, least=n), draw.size("D", 140)
    generator = draw.generator()
    queries, keys = (torch.randint(-2, 3, (rows, size), generator=generator) / 4 for rows in (n, m))
    copied = torch.rand(n, size, generator=generator) < draw.pick("near", [0.0, 1.0, 3.0]) / size**0.5
    keys[:n] = torch.where(copied, queries, keys[:n])
    queries, keys = draw.laid("queries", queries.to(dtype)), draw.laid("keys", keys.to(dtype))
    options = {
        "margin": draw.pick("margin", [0.0, 0.2, 0.25, 0.5, 1.0, 2.0, 0, 1e-3]),
        "mining": draw.pick("mining", triplet_cases.MININGS),
        "symmetric": draw.pick("symmetric", [True, False]),
    }
    reduction = draw.pick("reduction", REDUCTIONS)
    planted = draw.chance("planted", 0.15)
    if planted:
        queries, keys = plant_in_pairs(draw, queries, keys)
    actual = triplet_cases.run(queries, keys, "cpu", reduction, **options)
    eager = triplet_cases.run(queries, keys, "reference", reduction, **options)
    exact = triplet_cases.run(queries.double(), keys.double(), "reference", reduction, **options)
    if planted:
        assert_no_wrong_number(actual, eager, exact, torch.float32)
        return
    alike = draw.alike(max(n, m))
    triplet_cases.assert_results(actual, eager, exact, queries, keys, reduction, alike, **options)

    of_queries, of_keys = triplet_cases.sizes_of_terms(queries.double(), keys.double(), reduction, **options)
    leaves = [Leaf("queries", queries, alike * of_queries), Leaf("keys", keys, alike * of_keys)]
    check_call(
        draw,
        lambda impl, *tensors: mmkernels.triplet(*tensors, **options, reduction=reduction, impl=impl),
        leaves,
        dtype,
    )


def linear_cross_entropy(draw: Draw) -> None:
    dtype, n, classes, size = draw.dtype(), draw.size("N", 260, least=0), draw.size("V", 600), draw.size("D", 140)
    hidden = draw.rows("hidden", n, size, dtype, length=draw.pick("length", [0.0, 1.0, 10.0, 10.0, 100.0]))
    weight = draw.rows("weight", classes, size, dtype)
    generator = draw.generator()
    bias = torch.randn(classes, generator=generator).to(dtype) if draw.chance("bias", 0.6) else None
    planted = n > 0 and draw.chance("planted", 0.15)
    ignore_index = draw.pick("ignore_index", [-100, -100, -1, 0, classes - 1, 10**12])
    targets = torch.randint(classes, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) >= draw.pick("kept", [1.0, 1.0, 0.7, 0.05, 0.0])
    if planted:  # no row is ignored: those that are need not be read
        ignore_index = -100
    else:
        targets = targets.masked_fill(ignored, ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": draw.pick("label_smoothing", [0.0, 0.0, 0.1, 1.0])}

    of_hidden = largest_product(weight, hidden)
    of_logits = of_hidden + (0.0 if bias is None else bias.double().abs().max().item())
    of_loss = of_cross_entropy(draw, max(n, classes), of_logits)
    if planted:
        where = draw.pick("planted in", ["hidden", "weight"])
        hidden, weight = (
            draw.plant("planted", x) if name == where else x for name, x in (("hidden", hidden), ("weight", weight))
        )
    given = (hidden, weight, bias, targets)
    results = (
        linear_cross_entropy_cases.run(*given, "cpu", **options),
        linear_cross_entropy_cases.run_eager(*given, **options),
        linear_cross_entropy_cases.run(
            hidden.double(), weight.double(), None if bias is None else bias.double(), targets, "reference", **options
        ),
    )
    if planted:
        assert_no_wrong_number(*results, dtype, of_loss)
        return
    counts = targets != ignore_index
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())[counts]
    # How much of all rows' probabilities and targets falls to one class, as a multiple of one row's.
    on_class = logits.softmax(1).sum(0) + torch.bincount(targets[counts], minlength=classes)
    on_classes = max(1.0, on_class.max().item() / 2)
    largest = [x.double().abs().max().item() if len(x) else 0.0 for x in (weight, hidden)]
    of_gradients = [
        of_probabilities(of_hidden) * largest[0],
        of_probabilities(of_hidden) * on_classes * largest[1],
        of_probabilities(of_hidden) * on_classes,
    ]
    terms = [of_loss, *(draw.alike(max(n, classes)) * size for size in of_gradients)]
    linear_cross_entropy_cases.assert_results(*results, hidden, weight, terms)

    reduction = draw.pick("reduction", REDUCTIONS)
    counted = int(counts.sum())
    if reduction == "mean" and not counted:
        assert mmkernels.linear_cross_entropy(hidden, weight, targets, bias=bias, impl="cpu", **options).isnan()
        return
    share = 1.5 / (counted if reduction == "mean" else 1)
    leaves = [
        Leaf("hidden", hidden, share * terms[1]),
        Leaf("weight", weight, share * terms[2]),
    ]
    if bias is not None:
        of_bias = draw.pick("dtype of bias", [dtype, torch.float32, torch.float64, torch.float16])
        leaves.append(Leaf("bias", bias.to(of_bias), share * terms[3]))
    names = [leaf.name for leaf in leaves]

    def call(impl: str, *tensors: Tensor) -> Tensor:
        arguments = dict(zip(names, tensors, strict=True)) | options
        return mmkernels.linear_cross_entropy(**arguments, targets=targets, reduction=reduction, impl=impl)

    check_call(draw, call, leaves, dtype, share * terms[0] * (1 if reduction == "none" else counted))
