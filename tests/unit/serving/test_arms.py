"""Arms of an experiment: who is in which, what it changes, and where it is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from eddyline.settings.answers import LIMITS_MAX
from serving.answer.fusion import Cascade
from serving.answer.impressions import Impressions
from serving.answer.reciprocal_rank import ReciprocalRank
from serving.proto import retrieval_pb2 as pb
from serving.rpc.backends import WorkerBackend
from serving.rpc.client import Client
from serving.rules.arms import ARMS_MAX, Arm, Arms
from serving.rules.editorial import EditorialRules, Known, RulesRejected, parse
from tests.unit.serving.answers import ids
from tests.unit.serving.test_coordinator import SETTINGS, Plant, catalogue, seen

KNOWN = Known(("brand",), paths=("towers", "popular", "newest"))
USERS = [f"user-{n}" for n in range(4_000)]


def rules(text: str, known: Known = KNOWN) -> EditorialRules:
    return parse(f'version = "1"\n{text}'.encode(), known)


def refusal(text: str, known: Known = KNOWN) -> str:
    with pytest.raises(RulesRejected) as failed:
        rules(text, known)
    return str(failed.value)


def arm(name: str, rest: str = "", share: float = 0.5) -> str:
    return f'[[arm]]\nname = "{name}"\nshare = {share}\n{rest}\n'


def of(arms: Arms, user: str, label: str = "") -> str:
    found = arms.of(user, label)
    return "" if found is None else found.name


# ---------------------------------------------------------------- who is in which


def test_the_users_of_an_arm_are_as_many_as_its_share_and_always_the_same() -> None:
    arms = rules(arm("a", share=0.1) + arm("b", share=0.25)).arms
    counts = Counter(of(arms, user) for user in USERS)
    assert abs(counts["a"] / 4_000 - 0.1) < 0.02 and abs(counts["b"] / 4_000 - 0.25) < 0.03
    again = rules(arm("a", share=0.1) + arm("b", share=0.25)).arms
    assert [of(arms, user) for user in USERS] == [of(again, user) for user in USERS]
    assert of(arms, "user-1") == "" and of(arms, "user-3") == of(again, "user-3")


def test_a_larger_share_keeps_its_users_and_another_experiment_divides_anew() -> None:
    small, large = (rules(arm("a", share=share)).arms for share in (0.2, 0.4))
    kept = {user for user in USERS if of(small, user)}
    assert kept < {user for user in USERS if of(large, user)}
    other = rules('experiment = "next"\n' + arm("a", share=0.2)).arms
    both = sum(bool(of(other, user)) for user in kept) / len(kept)
    assert abs(both - 0.2) < 0.06


def test_all_users_may_be_in_arms() -> None:
    arms = rules(arm("a", share=0.3) + arm("b", share=0.7)).arms
    assert all(of(arms, user) for user in USERS)


def test_a_guest_is_in_none_and_a_label_of_the_request_decides() -> None:
    arms = rules(arm("a", share=1.0) + "").arms
    assert of(arms, "") == "" and of(arms, "ana") == "a"
    assert (of(arms, "ana", "a"), of(arms, "", "a"), of(arms, "ana", "control")) == ("a", "a", "")
    assert of(EditorialRules().arms, "ana") == ""


# ---------------------------------------------------------------- what a file may say


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (arm("a") + arm("a"), "arm 'a': another arm has the same name"),
        (arm("a", share=0.5) + arm("b", share=0.51), "the shares of all arms are 1.01, at most 1"),
        (arm("a", share=0.0), "Expected `float` > 0.0 - at `$.arm[0].share`"),
        (arm("a", share=1.1), "Expected `float` <= 1.0"),
        (arm(""), "arm '': its name has 0 bytes, allowed: 1 … 64"),
        (arm("x" * 65), f"arm '{'x' * 65}': its name has 65 bytes"),
        (arm("a", 'fusion = "best"'), "Invalid enum value 'best'"),
        (
            arm("a", 'fusion = "blend"'),
            "arm 'a': fusion: 'blend' needs the setting fusion = blend, it is 'cascade'",
        ),
        (arm("a", "weights = { towers = 2.0 }"), "arm 'a': weights: they are of the fusion 'rrf'"),
        (
            arm("a", 'fusion = "rrf"\nweights = { best = 2.0 }'),
            "arm 'a': weights: 'best' is not in recall_paths",
        ),
        (arm("a", 'fusion = "rrf"\nweights = { towers = 0.0 }'), "Expected `float` > 0.0"),
        (arm("a", "diversity = 1.1"), "Expected `float` <= 1.0"),
        (arm("a", "quota_young = 0.51"), "Expected `float` <= 0.5"),
        (arm("a", "quota_every = 0"), "Expected `int` >= 1"),
        (
            arm("a", "limits = { color = 1 }"),
            "arm 'a': limits: 'color', allowed are categories, tags, brand",
        ),
        (arm("a", "limits = { tags = -1 }"), "Expected `int` >= 0"),
        (arm("a", "users = 3"), "Object contains unknown field `users`"),
    ],
)
def test_what_an_arm_may_not_be(text: str, why: str) -> None:
    assert refusal(text).startswith(why)


def test_the_numbers_of_arms_and_limits_have_limits() -> None:
    for count, good in ((ARMS_MAX - 1, True), (ARMS_MAX, True), (ARMS_MAX + 1, False)):
        text = "".join(arm(f"a{n}", share=0.01) for n in range(count))
        if good:
            assert len(rules(text).arms.listed) == count
        else:
            assert refusal(text) == f"{count} arms, allowed are 0 … {ARMS_MAX}"
    for count in (LIMITS_MAX, LIMITS_MAX + 1):
        known = Known([f"t{n}" for n in range(count)])
        limits = ", ".join(f"t{n} = 1" for n in range(count))
        text = arm("a", f"limits = {{ {limits} }}")
        if count == LIMITS_MAX:
            assert rules(text, known).arms.listed[0].limits
        else:
            assert refusal(text, known).startswith("Expected `object` of length <= 8")
    blend = KNOWN._replace(fusion="blend")
    assert rules(arm("a", 'fusion = "blend"'), blend).arms.listed[0].fusion == "blend"


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    settings = msgspec.structs.replace(
        SETTINGS, answer_limits="categories=2", diversity=0.4, quota_young=0.2, quota_every=1
    )
    made = Plant(3, catalogue(120), settings=settings)
    for user in ("ana", "bob"):
        made.user(user, "item-1", "item-2")
    made.clicked({f"item-{n}": 100_000 + n for n in range(90)})
    yield made
    made.close()


@pytest.fixture(autouse=True)
def without_rules(plant: Plant) -> None:
    plant.rules.take(EditorialRules())


def both(plant: Plant, **more: object) -> pb.RetrieveResponse:
    """ana's ten items, of the worker, once the coordinator has given the same."""
    one, other = (c.retrieve("ana", 10, **more) for c in (plant.one, plant.client))  # type: ignore[arg-type]
    if not any(item.path == "young" for answer in (one, other) for item in answer.items):
        assert seen(one) == seen(other)
    assert one.arm == other.arm
    return one


def categories(answer: pb.RetrieveResponse) -> int:
    return max(Counter(int(one.removeprefix("item-")) % 7 for one in ids(answer)).values())


def take(plant: Plant, rest: str, name: str = "x") -> None:
    plant.rules.take(rules(arm(name, rest, share=1.0)))


def test_an_arm_changes_what_it_names_and_nothing_else(plant: Plant) -> None:
    plain = both(plant)
    assert plain.arm == "" and categories(plain) <= 2
    take(plant, "quota_young = 0.0")
    settings = both(plant)
    assert settings.arm == "x" and not any(i.path == "young" for i in settings.items)
    take(plant, "quota_young = 0.0\ndiversity = 0.0\nlimits = {}")
    free = both(plant)
    assert categories(free) > 2 or ids(free) != ids(settings)
    same = both(plant, limits={"categories": 2}, diversity=0.4)
    assert ids(same) == ids(settings)
    take(plant, "quota_young = 0.0\nlimits = { categories = 1 }")
    assert len({int(one.removeprefix("item-")) % 7 for one in ids(both(plant))[:7]}) == 7
    take(plant, "quota_young = 0.0\nlimits = { categories = 0 }\ndiversity = 0.0")
    assert ids(both(plant)) == ids(free)


def test_an_arm_has_its_own_fusion(plant: Plant) -> None:
    take(plant, "quota_young = 0.0\ndiversity = 0.0\nlimits = {}")
    cascade = both(plant)
    assert not cascade.items[0].fused_score
    take(plant, 'fusion = "rrf"\nquota_young = 0.0\ndiversity = 0.0\nlimits = {}')
    rrf = both(plant)
    assert rrf.items[0].fused_score > 0 and len(rrf.paths) >= 3
    take(
        plant,
        'fusion = "rrf"\nweights = { newest = 1000.0 }\nquota_young = 0.0\ndiversity = 0.0\n'
        "limits = {}",
    )
    assert both(plant).items[0].path == "newest"
    made = plant.backend.retriever.rules
    assert isinstance(made.fusion_for(None), Cascade)
    one = Arm(name="n", share=1.0, fusion="rrf")
    assert isinstance(made.fusion_for(one), ReciprocalRank)
    assert made.fusion_for(one) is made.fusion_for(Arm(name="m", share=0.5, fusion="rrf"))
    for weight in range(1, 200):
        made.fusion_for(Arm(name="n", share=1.0, fusion="rrf", weights={"newest": weight}))
    assert len(made._fusions) <= 64


def test_an_arm_may_have_quotas_that_the_settings_lack(plant: Plant) -> None:
    take(plant, "quota_fresh = 0.0\nquota_young = 0.5\nquota_every = 1")
    shown = [both(plant) for _ in range(5)]
    assert sum(item.path == "young" for answer in shown for item in answer.items) >= 5
    take(plant, "quota_young = 0.5\nquota_every = 1000")
    shown = [both(plant) for _ in range(20)]
    assert sum(any(i.path == "young" for i in answer.items) for answer in shown) <= 2


def test_a_request_chooses_an_arm_by_name_or_none(plant: Plant) -> None:
    plant.rules.take(rules(arm("x", "diversity = 0.0\nlimits = {}", share=1.0)))
    assert both(plant).arm == "x" and both(plant, arm="x").arm == "x"
    assert both(plant, arm="of the caller").arm == ""
    [found] = plant.one.explain("ana", [ids(both(plant))[0]], 10).items
    assert found.in_answer


def test_explain_sees_the_users_arm(plant: Plant) -> None:
    take(plant, 'fusion = "rrf"\nquota_young = 0.0\ndiversity = 0.0\nlimits = {}')
    answer = both(plant)
    for client in (plant.one, plant.client):
        found = client.explain("ana", ids(answer), 10)
        assert [item.rank for item in found.items] == list(range(1, 11))
        assert all(item.fused_score > 0 for item in found.items)


def test_the_record_of_an_answer_names_its_arm(plant: Plant) -> None:
    take(plant, "diversity = 0.1")
    impressions = Impressions(1.0)
    assert plant.alone._backend is not None
    before = plant.alone._backend
    plant.alone.serve(WorkerBackend(before.held, plant.backend.retriever, impressions))  # type: ignore[attr-defined]
    try:
        with Client(plant.alone_server.address) as client:
            for label in ("", "x", "mine"):
                client.retrieve("ana", 3, arm=label)
            client.retrieve_batch([pb.RetrieveRequest(user_id="ana", k=2)])
    finally:
        plant.alone.serve(before)
    assert [one.recorded().arm for one in impressions.take(9)] == ["x", "x", "mine", "x"]
