import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig
from ray_moe.ops.schedules import ScheduleSettings, factor

STEPS = 51
"""Up to the end; later the cosine of transformers rises again."""


def rates_of_transformers(name, warmup, **specific):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=50, scheduler_specific_kwargs=specific
    )
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("settings", "name", "specific"),
    [
        ({"kind": "constant"}, "constant_with_warmup", {}),
        ({"kind": "linear", "total_steps": 50}, "linear", {}),
        ({"kind": "cosine", "total_steps": 50}, "cosine", {}),
        ({"kind": "cosine", "total_steps": 50, "final_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"kind": "inverse_sqrt"}, "inverse_sqrt", {}),
        (
            {"kind": "wsd", "total_steps": 50, "decay_steps": 20},
            "warmup_stable_decay",
            {"num_decay_steps": 20, "decay_type": "linear"},
        ),
    ],
)
def test_rates_are_those_of_transformers(settings, name, specific, warmup):
    schedule = ScheduleSettings(warmup_steps=warmup, **settings)
    own = [factor(schedule, step) for step in range(STEPS)]
    assert own == pytest.approx(rates_of_transformers(name, warmup, **specific), abs=1e-12)


@given(
    kind=st.sampled_from(["linear", "cosine", "wsd"]),
    warmup=st.integers(0, 10),
    rest=st.integers(0, 20),
    final=st.floats(0, 1),
)
def test_a_schedule_that_ends_falls_from_the_peak_to_its_final_ratio_and_stays_there(kind, warmup, rest, final):
    decay = rest // 2 if kind == "wsd" else None
    schedule = ScheduleSettings(kind, warmup, total_steps=warmup + rest, decay_steps=decay, final_ratio=final)
    rates = [factor(schedule, step) for step in range(warmup + rest + 5)]
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    assert rest == 0 or falling[0] == pytest.approx(1)
    assert rates[warmup + rest :] == pytest.approx([final] * 5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "triangle"}, "kind is one of"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"kind": "cosine"}, "cosine needs total_steps"),
        ({"kind": "wsd", "total_steps": 9}, "decay_steps is needed"),
        ({"kind": "wsd", "total_steps": 9, "decay_steps": -1}, "decay_steps is 0 or more"),
        ({"kind": "linear", "total_steps": 9, "decay_steps": 1}, "for it alone"),
        ({"kind": "linear", "total_steps": 9, "warmup_steps": 10}, "has room"),
        ({"kind": "wsd", "total_steps": 9, "warmup_steps": 5, "decay_steps": 5}, "has room"),
        ({"kind": "linear", "total_steps": 9, "final_ratio": float("nan")}, "final_ratio"),
        ({"kind": "constant", "final_ratio": 0.5}, "final_ratio is for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(InvalidConfig, match=said):
        ScheduleSettings(**settings)
