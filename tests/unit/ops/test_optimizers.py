import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load, save

from ray_moe.errors import InvalidConfig
from ray_moe.ops.optimizers import Optimizer, OptimizerSettings

SHAPES = {"up.weight": (33, 7), "norm.weight": (33,), "up.bias": (5,), "down.weight": (70, 64)}
"""The last one is large enough for 8-bit state."""

KINDS = [
    OptimizerSettings(weight_decay=0.1),
    OptimizerSettings(betas=(0.8, 0.95), eps=1e-6),
    OptimizerSettings(fused=True, weight_decay=0.1),
    OptimizerSettings("sgd", weight_decay=0.01),
    OptimizerSettings("sgd", momentum=0.9),
    OptimizerSettings("sgd", momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    OptimizerSettings("adamw8bit", weight_decay=0.1),
    OptimizerSettings(offload="cpu"),
]


def changed(settings):
    """What of the settings is not their default."""
    default = asdict(OptimizerSettings())
    return ",".join(f"{key}={value}" for key, value in asdict(settings).items() if value != default[key])


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def set_gradients(params, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for name, param in params.items():
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if name in without else gradient


def reference(settings, params):
    """What a user would write with torch alone."""
    groups = [
        {"params": list(params), "weight_decay": decay}
        for params, decay in (
            ([p for name, p in params.items() if settings.decays(name)], settings.weight_decay),
            ([p for name, p in params.items() if not settings.decays(name)], 0.0),
        )
    ]
    if settings.kind == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            fused=settings.fused,
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=settings.fused)


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("no_decay", [(), ("norm*", "*.bias")])
@pytest.mark.parametrize("settings", [s for s in KINDS if s.kind != "adamw8bit"], ids=changed)
def test_fifty_steps_are_bitwise_those_of_torch(settings, no_decay):
    settings = replace(settings, no_decay=no_decay)
    own, plain = parameters(), parameters()
    optimizer, torchs = Optimizer(settings, own), reference(settings, plain)
    for step in range(50):
        lr = 0.01 / (step + 1)
        set_gradients(own, step)
        set_gradients(plain, step)
        optimizer.step(lr, grads_scale=0.37)
        torchs.param_groups[0]["lr"] = torchs.param_groups[1]["lr"] = lr
        for param in plain.values():
            param.grad.mul_(0.37)
        torchs.step()
    assert_equal(own, plain)
    assert all(param.grad is None for param in own.values())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_experts_of_their_own_step_as_rows_of_a_stack_that_not_all_tokens_reach(kind):
    settings = OptimizerSettings(kind, lr=0.01, weight_decay=0.1, momentum=0.9 if kind == "sgd" else 0.0)
    generator = torch.Generator().manual_seed(1)
    stack = torch.nn.Parameter(torch.randn(4, 9, 7, generator=generator))
    experts = {f"experts.{i}": torch.nn.Parameter(stack[i].detach().clone()) for i in range(4)}
    optimizer, torchs = Optimizer(settings, experts), reference(settings, {"stack": stack})
    for step in range(50):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for i, expert in enumerate(experts.values()):
            if (step + i) % 3 == 0:
                stack.grad[i] = 0
            else:
                expert.grad = stack.grad[i].clone()
        optimizer.step(missing_as_zero=True)
        torchs.step()
    assert torch.equal(torch.stack(list(experts.values())), stack)


def test_a_parameter_without_gradient_stays_as_it_is():
    own, plain = parameters(), parameters()
    optimizer, torchs = Optimizer(KINDS[0], own), reference(KINDS[0], plain)
    for step in range(6):
        without = ("up.weight",) if step % 2 else ()
        set_gradients(own, step, without)
        set_gradients(plain, step, without)
        optimizer.step()
        torchs.step()
    assert_equal(own, plain)
    assert optimizer.state_of("up.weight")["step"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_lower_precision_are_rounded_from_a_master_in_float32(dtype):
    settings = OptimizerSettings(lr=1e-4, weight_decay=0.1)
    own = parameters(dtype=dtype)
    masters = {name: torch.nn.Parameter(param.detach().float()) for name, param in own.items()}
    optimizer, torchs = Optimizer(settings, own), reference(settings, masters)
    for step in range(50):
        set_gradients(own, step)
        for name, master in masters.items():
            master.grad = own[name].grad.float() * 0.3
        optimizer.step(grads_scale=0.3)
        torchs.step()
        assert_equal(own, {name: master.to(dtype) for name, master in masters.items()})
        assert all(param.grad is None for param in own.values())
    assert_equal({name: optimizer.state_of(name)["master"] for name in own}, masters)


def test_weights_in_lower_precision_are_stepped_as_they_are_if_told_so():
    settings = OptimizerSettings(master_dtype="weights")
    own, plain = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer, torchs = Optimizer(settings, own), reference(settings, plain)
    for step in range(5):
        set_gradients(own, step)
        set_gradients(plain, step)
        optimizer.step()
        torchs.step()
    assert_equal(own, plain)
    assert optimizer.state_of("up.weight")["exp_avg"].dtype == torch.bfloat16


def test_a_gradient_may_be_more_precise_than_its_weights():
    own = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    own.grad_dtype = torch.float32
    own.grad = torch.full((3,), 1.001)
    optimizer = Optimizer(OptimizerSettings("sgd", lr=1.0), {"w": own})
    optimizer.step()
    assert torch.equal(optimizer.state_of("w")["master"], torch.full((3,), -1.001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("settings", KINDS, ids=changed)
def test_a_parameter_goes_on_elsewhere_as_if_it_had_stayed(settings, steps_before, dtype):
    stays, moves = parameters(dtype=dtype), parameters(dtype=dtype)
    home, away = Optimizer(settings, stays), Optimizer(settings, moves)
    for step in range(steps_before):
        for optimizer, params in ((home, stays), (away, moves)):
            set_gradients(params, step)
            optimizer.step()
    for name in ("down.weight", "norm.weight"):
        state = load(save(away.state_of(name)))
        away.remove(name)
        moves[name] = torch.nn.Parameter(torch.zeros(SHAPES[name], dtype=dtype))
        away.add(name, moves[name])
        away.load_state(name, state)
    assert_equal(moves, stays)
    for step in range(5):
        for optimizer, params in ((home, stays), (away, moves)):
            set_gradients(params, 100 + step)
            optimizer.step()
    assert_equal(moves, stays)
    for name in stays:
        assert_equal(away.state_of(name), home.state_of(name))


@pytest.mark.parametrize("settings", KINDS, ids=changed)
def test_loading_an_earlier_state_takes_a_parameter_back_to_it(settings):
    params = parameters()
    optimizer = Optimizer(settings, params)

    def run(first, last):
        for step in range(first, last):
            set_gradients(params, step)
            optimizer.step()
        return {name: param.detach().clone() for name, param in params.items()}

    run(0, 3)
    snapshot = {name: {k: v.clone() for k, v in optimizer.state_of(name).items()} for name in params}
    at_seven = run(3, 7)
    set_gradients(params, 7)
    for name in params:
        optimizer.load_state(name, snapshot[name])
    optimizer.step()  # the gradient belonged to weights that are no more
    assert_equal(
        {name: optimizer.state_of(name)["master"] for name in params}, {n: s["master"] for n, s in snapshot.items()}
    )
    assert_equal(run(3, 7), at_seven)


@pytest.mark.parametrize("settings", KINDS, ids=changed)
def test_a_state_of_weights_alone_begins_anew(settings):
    params, fresh = parameters(), parameters()
    optimizer, other = Optimizer(settings, params), Optimizer(settings, fresh)
    set_gradients(params, 0)
    optimizer.step()
    for name, param in fresh.items():
        optimizer.load_state(name, {"master": param.detach()})
    for stepped, named in ((optimizer, params), (other, fresh)):
        set_gradients(named, 1)
        stepped.step()
    assert_equal(params, fresh)


def test_a_removed_parameter_is_left_alone_and_its_name_is_free_again():
    params = parameters()
    optimizer = Optimizer(OptimizerSettings(), params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.remove("norm.weight")
    before = params["norm.weight"].detach().clone()
    set_gradients(params, 1)
    optimizer.step()
    assert torch.equal(params["norm.weight"], before)
    assert optimizer.names == ["up.weight", "up.bias", "down.weight"]
    optimizer.add("norm.weight", params["norm.weight"])
    assert optimizer.state_of("norm.weight").keys() == {"master"}


def test_8_bit_state_is_a_fourth_of_it_and_training_gets_as_far():
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    losses, state_bytes = {}, {}
    for kind in ("adamw", "adamw8bit"):
        weights = torch.nn.Parameter(torch.zeros(128, 64))
        optimizer = Optimizer(OptimizerSettings(kind, lr=0.05), {"w": weights})
        for _ in range(100):
            loss = (weights - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
        state = optimizer.state_of("w")
        state_bytes[kind] = sum(t.nbytes for key, t in state.items() if key.startswith("exp_avg"))
    assert state_bytes["adamw8bit"] < 0.26 * state_bytes["adamw"]
    assert losses["adamw8bit"] < 0.02
    assert losses["adamw"] < 0.02


def test_8_bit_state_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InvalidConfig, match=r"ray-moe\[train8bit\]"):
        Optimizer(OptimizerSettings("adamw8bit"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "adam"}, "kind is one of"),
        ({"lr": -1e-3}, "lr is"),
        ({"lr": float("nan")}, "lr is"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("inf")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"kind": "sgd", "momentum": -0.1}, "momentum is finite"),
        ({"momentum": 0.9}, "are for sgd"),
        ({"kind": "sgd", "nesterov": True}, "needs momentum"),
        ({"no_decay": "*bias"}, "no_decay"),
        ({"master_dtype": "float8"}, "master_dtype"),
        ({"kind": "adamw8bit", "fused": True}, "fused"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(InvalidConfig, match=said):
        OptimizerSettings(**settings)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda optimizer: optimizer.step(-1.0),
        lambda optimizer: optimizer.step(grads_scale=float("nan")),
        lambda optimizer: optimizer.add("up.bias", torch.zeros(5)),
        lambda optimizer: optimizer.remove("gate"),
        lambda optimizer: optimizer.state_of("gate"),
        lambda optimizer: optimizer.load_state("gate", {}),
        lambda optimizer: optimizer.load_state("up.bias", {"momentum_buffer": torch.zeros(5)}),
        lambda optimizer: optimizer.load_state("down.weight", {"step": torch.tensor(1.0)}),
        lambda optimizer: optimizer.load_state("up.bias", {"master": torch.zeros(6)}),
        lambda optimizer: optimizer.load_state(
            "up.bias", {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5).byte()}
        ),
    ],
)
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_what_is_wrong_changes_nothing(kind, wrong):
    params, untouched = parameters(), parameters()
    optimizer, other = (Optimizer(OptimizerSettings(kind), named) for named in (params, untouched))
    for step in range(3):
        set_gradients(params, step)
        set_gradients(untouched, step)
        with pytest.raises(InvalidConfig):
            wrong(optimizer)
        optimizer.step()
        other.step()
    assert_equal(params, untouched)


def test_float64_weights_have_no_8_bit_state():
    optimizer = Optimizer(OptimizerSettings("adamw8bit"))
    with pytest.raises(InvalidConfig, match="float64"):
        optimizer.add("w", torch.zeros(3, dtype=torch.float64))
