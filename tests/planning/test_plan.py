"""What a plan decides: batch, strategy, time, links, momentum; and what it says where nothing fits."""

from dataclasses import replace

import pytest

from momentum_lm.errors import UserError
from momentum_lm.model import DecoderConfig
from momentum_lm.model.sizes import architecture
from momentum_lm.planning.hardware import GPUS
from momentum_lm.planning.memory import step_memory
from momentum_lm.planning.plan import ENOUGH_TOKENS, USABLE, Job, _micro_batch, make_plan


def job(arch="momentum_lm_1_3b", gpu="h200", gpus=64, **changes):
    config = DecoderConfig(51200, **architecture(arch), max_positions=2048)
    return Job(
        **{
            "config": config,
            "gpu": gpu,
            "gpus": gpus,
            "tokens": 10**11,
            "length": 2048,
            "batch_tokens": 512_000,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def medium():
    return make_plan(job())


def test_batches_and_time_of_a_medium_model(medium):
    chosen = medium.chosen
    assert [(o.strategy, o.checkpointing) for o in medium.options] == [
        ("ddp", False),
        ("fsdp", False),
        ("ddp", True),
        ("fsdp", True),
    ]
    assert (chosen.strategy, chosen.checkpointing, chosen.fits) == ("ddp", False, True)
    for option in medium.options:
        assert option.tokens_per_update == option.micro_batch * option.update_freq * 64 * 2048 == 524_288
        assert option.micro_batch <= option.largest_micro_batch and option.memory.total <= USABLE * 141e9
    assert medium.updates == -(-(10**11) // 524_288)
    rate = 0.45 * 989e12 / medium.flops_per_token
    assert medium.tokens_per_second == pytest.approx(64 * rate, rel=1e-6)
    assert medium.days == pytest.approx(10**11 / (64 * rate) / 86400, rel=1e-4)
    assert medium.options[2].compute_seconds == pytest.approx(4 / 3 * chosen.compute_seconds)


@pytest.mark.nightly
def test_the_largest_micro_batch_is_the_largest():
    small = job("gpt_lm_350m", "l40s", 1)
    [plain, checkpointed] = make_plan(small).options
    for option in (plain, checkpointed):
        config = replace(small.config, checkpoint_activations=option.checkpointing)
        least, most = (step_memory(config, option.largest_micro_batch + more, 2048).total for more in (0, 2))
        assert least <= USABLE * 48e9 < most
    assert plain.update_freq > 1 and checkpointed.largest_micro_batch > 3 * plain.largest_micro_batch


@pytest.mark.parametrize(
    ("share", "largest", "expected"), [(16, 6, 4), (4, 4, 4), (504, 61, 56), (7, 3, 3), (13, 5, 4), (1, 1, 1)]
)
def test_micro_batches_divide_an_update_about_evenly(share, largest, expected):
    batch = _micro_batch(share, largest)
    assert batch == expected and abs(batch * round(share / batch) - share) <= 1


def test_links(medium):
    ddp, fsdp, *_ = medium.options
    total, in_blocks = medium.parameters.total, 24 * medium.parameters.block
    assert ddp.communication_bytes == pytest.approx(2 * 63 / 64 * 4 * total)
    assert fsdp.communication_bytes == pytest.approx(63 / 64 * (4 * in_blocks + 4 * (total - in_blocks) + 4 * total))
    assert ddp.communication_seconds == pytest.approx(ddp.communication_bytes / 400e9) and ddp.exposed_seconds == 0
    one_node = make_plan(job(gpus=8, strategy="ddp", checkpointing=True)).options
    assert [o.communication_seconds for o in one_node] == pytest.approx([2 * 7 / 8 * 4 * total / 450e9])
    [slow] = make_plan(job(node_bandwidth=1e9, strategy="ddp", checkpointing=True)).options
    assert slow.exposed_seconds == pytest.approx(slow.communication_seconds - 0.75 * slow.compute_seconds)
    assert slow.step_seconds == pytest.approx(slow.communication_seconds + 0.25 * slow.compute_seconds)


@pytest.mark.nightly
def test_cost_of_momentum(medium):
    momentum = medium.momentum
    tensor = medium.chosen.micro_batch * 2048 * 2048 * 2
    assert momentum.kernel and momentum.parameters == 0 and momentum.bytes_per_block == 8 * tensor
    assert momentum.seconds == pytest.approx(medium.chosen.update_freq * 24 * 8 * tensor / 4.8e12)
    assert 0 < momentum.flops_share < 0.002
    small = job("momentum_lm_125m", gpus=1, checkpointing=True)
    several = make_plan(replace(small, config=replace(small.config, momentum_kind="multi_ema"))).momentum
    taps = make_plan(replace(small, config=replace(small.config, momentum_kind="fir"))).momentum
    assert taps.kernel and taps.parameters == 12 * 3 * 768
    assert not several.kernel and several.parameters == 12 * 2 * 8 * 768
    assert make_plan(replace(small, config=replace(small.config, momentum_kind="none"))).momentum is None


@pytest.mark.nightly
def test_a_micro_batch_too_small_gives_way_to_checkpointing():
    plan = make_plan(job("gpt_lm_6_7b", "a100-40gb", 64))
    plain, chosen = plan.options[1], plan.chosen
    assert plain.fits and plain.largest_micro_batch * 2048 < ENOUGH_TOKENS
    assert (chosen.strategy, chosen.checkpointing) == ("fsdp", True) and chosen.micro_batch * 2048 >= ENOUGH_TOKENS


@pytest.mark.nightly
def test_where_nothing_fits_the_hints_do():
    plan = make_plan(job("gpt_lm_6_7b", "l40s", 2))
    assert plan.chosen is None and plan.updates == plan.tokens_per_second == 0
    hints = plan.hints
    assert next(iter(hints[0])) == "gpus" and {h.get("gpu") for h in hints[1:]} >= {"h200", "b200"} and len(hints) >= 3
    assert all(make_plan(replace(job("gpt_lm_6_7b", "l40s", 2), **hint)).chosen for hint in hints)
    assert make_plan(job("gpt_lm_6_7b", "l40s", hints[0]["gpus"] - 1)).chosen is None


@pytest.mark.nightly
def test_a_micro_batch_that_was_asked_for_and_does_not_fit():
    too_large = job("gpt_lm_1_3b", "a100-40gb", 1, micro_batch=64, checkpointing=True)
    plan = make_plan(too_large)
    assert plan.chosen is None and list(plan.hints[0]) == ["micro_batch"]
    assert make_plan(replace(too_large, **plan.hints[0])).chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "h300"}, "gpu='h300': choose one of a100-40gb, a100-80gb, h100-pcie, h100, h200, b200, l40s, v100"),
        ({"gpus": 0}, "gpus=0: must be at least 1"),
        ({"gpus": 12}, "gpus=12: must be a multiple of the GPUs of a node, gpus_per_node=8"),
        ({"tokens": 0}, "tokens=0: must be at least 1"),
        ({"length": 0}, "length=0: must be at least 1"),
        ({"micro_batch": 0}, "micro_batch=0: must be at least 1"),
        ({"mfu": 0.0}, "mfu=0.0: must lie between 0 and 1"),
        ({"mfu": float("nan")}, "mfu=nan: must lie between 0 and 1"),
        ({"node_bandwidth": 0.0}, "node_bandwidth=0.0: must be above 0"),
        ({"gpu": "v100"}, "gpu='v100' has no bf16; use bf16=False"),
        ({"gpus": 1, "strategy": "fsdp"}, "strategy='fsdp': needs gpus 2 or more"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError) as error:
        job(**changes)
    assert message in str(error.value)


def test_precision_decides_the_peak():
    assert job(bf16=False).peak_flops == GPUS["h200"].fp32_flops < job().peak_flops == 989e12
