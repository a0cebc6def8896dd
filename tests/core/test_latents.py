"""`LatentSet`: what it accepts, what it makes of it, and its form in JSON."""

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense.core.latents import LatentSet, draw_alike
from defense.errors import CheckpointError, ConfigError, DefenseError, HookPointError


@st.composite
def latent_sets(draw: st.DrawFn) -> LatentSet:
    latents = draw(st.lists(st.integers(0, 2**31), max_size=6))

    def column(numbers: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(numbers, min_size=len(latents), max_size=len(latents)))

    finite = st.floats(allow_nan=False, allow_infinity=False)
    edit = draw(st.sampled_from(["scale", "project", "set"]))
    return LatentSet(
        name=draw(st.text(st.characters(codec="utf-8"), max_size=8)),
        latents=latents,
        gains=column(st.floats(0, 1)),
        edit=edit,
        scope=draw(st.sampled_from(["cls", "patch", "all"])),
        values=column(finite) if edit == "set" else (),
        scores={key: column(finite) for key in draw(st.sets(st.text(max_size=4), max_size=3))},
        provenance=draw(
            st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4), max_size=3)
        ),
        spares_high_norm=edit != "set" and draw(st.booleans()),
    )


@given(latent_sets())
def test_a_set_survives_its_round_trip_through_json(latent_set: LatentSet) -> None:
    assert LatentSet.from_dict(json.loads(json.dumps(latent_set.to_dict(), allow_nan=False))) == latent_set


@given(latent_sets(), st.frozensets(st.integers(0, 5)))
def test_without_keeps_the_other_latents_with_their_numbers_in_order(
    latent_set: LatentSet, rows: frozenset[int]
) -> None:
    gone = frozenset(latent for row, latent in enumerate(latent_set.latents) if row in rows)
    kept = [row for row, latent in enumerate(latent_set.latents) if latent not in gone]
    rest = latent_set.without(gone)
    assert rest.latents == tuple(latent_set.latents[row] for row in kept)
    assert rest.gains == tuple(latent_set.gains[row] for row in kept)
    assert rest.values == (tuple(latent_set.values[row] for row in kept) if latent_set.edit == "set" else ())
    assert rest.scores == {key: tuple(column[row] for row in kept) for key, column in latent_set.scores.items()}
    for same in ("name", "edit", "scope", "provenance", "spares_high_norm"):
        assert getattr(rest, same) == getattr(latent_set, same)


def test_without_ignores_latents_that_the_set_does_not_have() -> None:
    latent_set = LatentSet("text", (3, 1), gains=(0.0, 0.5))
    assert latent_set.without(frozenset({7})) == latent_set
    assert latent_set.without(frozenset({1, 3})).latents == ()


def test_gains_are_zero_unless_given() -> None:
    assert LatentSet("text", (3, 1)).gains == (0.0, 0.0)


@pytest.mark.parametrize("field", ["name", "latents", "gains"])
def test_a_set_is_frozen(field: str) -> None:
    latent_set = LatentSet("text", (3,))
    with pytest.raises(FrozenInstanceError):
        setattr(latent_set, field, getattr(latent_set, field))


def test_a_set_does_not_change_with_the_objects_it_was_made_from() -> None:
    latents, gains, column = [3, 1], np.array([0.0, 0.5]), [1.0, 2.0]
    scores = {"effect": column}
    latent_set = LatentSet("text", latents, gains, scores=scores)
    latents.append(9)
    gains[0] = 1
    column[0] = 9.0
    scores["harm"] = [0.0]
    assert latent_set == LatentSet("text", (3, 1), (0.0, 0.5), scores={"effect": (1.0, 2.0)})


def test_numbers_of_numpy_become_those_of_python() -> None:
    latent_set = LatentSet(
        "text",
        np.array([3, 1]),
        np.array([0, 0.5], np.float32),
        "set",
        values=np.array([1, 2]),
        scores={"a": np.ones(2)},
    )
    assert [type(latent) for latent in latent_set.latents] == [int, int]
    for column in (latent_set.gains, latent_set.values, latent_set.scores["a"]):
        assert [type(number) for number in column] == [float, float]
    json.dumps(latent_set.to_dict())


def test_fault_60_a_latent_twice_in_a_set_counts_once_and_the_first_wins() -> None:
    latent_set = LatentSet(
        "text", (5, 2, 5, 2, 7), (0.1, 0.2, 0.3, 0.4, 0.5), "set", values=(1, 2, 3, 4, 5), scores={"a": (9, 8, 7, 6, 5)}
    )
    assert latent_set.latents == (5, 2, 7)
    assert latent_set.gains == (0.1, 0.2, 0.5)
    assert latent_set.values == (1, 2, 5)
    assert latent_set.scores == {"a": (9, 8, 5)}


def test_fault_60_a_set_may_be_empty() -> None:
    assert LatentSet("text", ()).gains == ()
    LatentSet("text", ()).check_range(1)


@pytest.mark.parametrize("latent", [-1, 8, 2**40])
def test_fault_60_a_latent_out_of_range_is_named_with_the_range(latent: int) -> None:
    with pytest.raises(ConfigError, match=rf"'text' names latent {latent}; this SAE has latents 0 to 7"):
        LatentSet("text", (0, latent)).check_range(8)


def test_fault_60_the_first_and_last_latent_are_in_range() -> None:
    LatentSet("text", (0, 7)).check_range(8)


@pytest.mark.parametrize("gain", [0, 0.0, 0.5, 1, 1.0])
def test_fault_61_gains_from_0_to_1_are_allowed(gain: float) -> None:
    assert LatentSet("text", (3,), (gain,)).gains == (gain,)


@pytest.mark.parametrize("gain", [2, -1, 1 + 1e-12, -1e-300])
def test_fault_61_other_gains_are_refused(gain: float) -> None:
    with pytest.raises(ConfigError, match=r"latent 3 has gain .*; it must lie in \[0, 1\]"):
        LatentSet("text", (3,), (gain,))


@pytest.mark.parametrize("gain", [float("nan"), float("inf"), -float("inf")])
def test_fault_61_a_gain_that_is_not_finite_is_refused(gain: float) -> None:
    with pytest.raises(ConfigError, match="gains"):
        LatentSet("text", (3,), (gain,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"edit": "erase"}, "edit='erase'.*scale, project, set", id="edit"),
        pytest.param({"gains": (0.5,)}, "has 2 latents but 1 gains", id="too few gains"),
        pytest.param({"gains": (0.5,) * 3}, "has 2 latents but 3 gains", id="too many gains"),
        pytest.param({"scores": {"effect": (1.0,)}}, r"has 2 latents but 1 scores\['effect'\]", id="too few scores"),
        pytest.param({"edit": "set"}, "has 2 latents but 0 values", id="set without values"),
        pytest.param({"values": (1.0, 2.0)}, "values belong to edit='set'; .* edit='scale'", id="values without set"),
        pytest.param({"edit": "set", "values": (1.0, float("inf"))}, "values .*finite", id="infinite value"),
        pytest.param({"edit": "set", "values": (1.0, 10**400)}, "values .*finite", id="enormous value"),
        pytest.param({"scores": {"effect": (1.0, float("nan"))}}, "scores.*finite", id="NaN score"),
        pytest.param({"scores": [1.0, 2.0]}, "scores is .*; want Mapping", id="scores without names"),
        pytest.param({"latents": (1.0, 2.0)}, "latents .* of type int", id="fractional latents"),
        pytest.param({"latents": (True, False)}, "latents .* of type int", id="a mask for latents"),
        pytest.param({"latents": "12"}, "latents .* of type int", id="a string of digits"),
        pytest.param({"latents": 3}, "latents .* of type int", id="one number"),
        pytest.param({"gains": ("0", "1")}, "gains .* of type float", id="gains as strings"),
        pytest.param({"gains": (True, False)}, "gains .* of type float", id="gains as booleans"),
        pytest.param({"name": None}, "name is None; want str", id="no name"),
        pytest.param({"provenance": "me"}, "provenance is 'me'; want Mapping", id="provenance as a string"),
    ],
)
def test_a_set_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentSet(**{"name": "text", "latents": (3, 1), **fields})


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(HookPointError, match="scope='pos'; it must be one of cls, patch, all"):
        LatentSet("text", (3,), scope="pos")


@pytest.mark.parametrize("field", list(LatentSet("text", ()).to_dict()))
def test_a_field_that_is_missing_in_json_is_noticed(field: str) -> None:
    fields = LatentSet("text", (3,)).to_dict()
    del fields[field]
    with pytest.raises(CheckpointError, match=field):
        LatentSet.from_dict(fields)


def test_an_unknown_field_in_json_is_noticed() -> None:
    with pytest.raises(CheckpointError, match="'strength'"):
        LatentSet.from_dict({**LatentSet("text", (3,)).to_dict(), "strength": 0.5})


def test_a_set_of_an_older_version_says_that_it_is_not_unsafe() -> None:
    fields = LatentSet("text", (3,)).to_dict()
    assert "unsafe" not in fields
    assert LatentSet.from_dict({**fields, "unsafe": False}) == LatentSet("text", (3,))
    for value in (True, None, 0, "no"):
        with pytest.raises(ConfigError, match=r"unsafe=.*bring them into \[0, 1\]"):
            LatentSet.from_dict({**fields, "unsafe": value})


def test_a_set_is_written_as_before_there_was_a_choice_about_patches_of_high_norm_unless_it_spares_them() -> None:
    assert "spares_high_norm" not in LatentSet("text", (3,)).to_dict()
    sparing = LatentSet("text", (3,), spares_high_norm=True)
    assert sparing.to_dict()["spares_high_norm"] is True
    assert LatentSet.from_dict(sparing.to_dict()) == sparing
    assert (sparing.tokens, LatentSet("text", (3,)).tokens) == ("all, but for patches of high norm", "all")
    with pytest.raises(ConfigError, match="spares_high_norm is 1; want bool"):
        LatentSet("text", (3,), spares_high_norm=1)
    with pytest.raises(ConfigError, match="steers every token"):
        LatentSet("text", (3,), edit="set", values=(1.0,), spares_high_norm=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_json_gives_a_set_or_an_error_of_this_package(data: st.DataObject) -> None:
    fields = LatentSet("text", (3, 1), (0.0, 0.5), "set", values=(1, 2), scores={"a": (1, 2)}).to_dict()
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)
    given_fields = data.draw(st.just(fields) | json_values)
    try:
        latent_set = LatentSet.from_dict(given_fields)
    except DefenseError:
        return
    assert LatentSet.from_dict(latent_set.to_dict()) == latent_set


# --- a random control -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 40))
def test_latents_drawn_alike_are_as_many_others_that_fire(seed, n, n_dead):
    rng = np.random.default_rng(seed)
    activity = rng.permutation(np.concatenate([np.zeros(n_dead), rng.exponential(size=60)]))
    chosen = rng.choice(np.flatnonzero(activity), n, replace=False).tolist()
    drawn = draw_alike(chosen, activity, np.random.default_rng(seed))
    assert len(set(drawn)) == n
    assert not set(drawn) & set(chosen)
    assert (activity[drawn] > 0).all()
    assert draw_alike(chosen, activity, np.random.default_rng(seed)) == drawn


def test_latents_drawn_alike_are_near_in_rank_and_differ_by_seed():
    activity = np.random.default_rng(0).permutation(1000).astype(float)
    chosen = [int(np.flatnonzero(activity == rank)[0]) for rank in (30, 500, 501, 990)]
    drawn = [draw_alike(chosen, activity, np.random.default_rng(seed)) for seed in range(20)]
    assert np.abs(activity[drawn] - activity[chosen]).max() <= 21
    assert len(set(map(tuple, drawn))) == 20


def test_a_dead_latent_is_replaced_by_one_of_those_that_fire_least():
    activity = np.concatenate([np.zeros(50), np.arange(1.0, 101.0)])
    assert all(50 <= draw_alike([3], activity, np.random.default_rng(seed))[0] < 70 for seed in range(20))


def test_a_draw_is_the_same_in_every_release():
    """The control of a published figure can be drawn again."""
    activity = np.arange(200) * 37.0 % 200
    assert draw_alike([3, 50, 51, 199], activity, np.random.default_rng(1)) == [138, 88, 67, 69]


def test_where_too_few_others_fire_no_control_is_drawn():
    activity = np.array([5.0, 4.0, 3.0, 0.0, 0.0, 2.0])
    assert draw_alike([0], activity, np.random.default_rng(0))[0] in (1, 2, 5)
    with pytest.raises(ConfigError, match=r"3 of 6 latents are chosen, and too few others fire \(1\)"):
        draw_alike([0, 1, 2], activity, np.random.default_rng(0))
