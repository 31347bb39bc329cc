"""Names of entries, and what every loss module shares."""

import copy
import pickle
from dataclasses import dataclass, fields

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from rlloss_nn import LossModule


class Squared(LossModule):
    """The smallest loss there can be."""

    @dataclass
    class _AcceptedKeys:
        prediction: str = "prediction"
        target: tuple = ("next", "target")

    default_keys = _AcceptedKeys
    out_keys = ["loss_squared"]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def _of_tensordict(self, tensordict):
        prediction = self._get(tensordict, "prediction", self.tensor_keys.prediction)
        target = self._get(tensordict, "target", self.tensor_keys.target, "It is what the prediction is compared with.")
        return TensorDict({"loss_squared": (prediction - target).square().mean()}, [])

    def _read_keys(self):
        return [self.tensor_keys.prediction, self.tensor_keys.target]


def batch():
    return TensorDict({"prediction": torch.ones(3), "next": {"target": torch.zeros(3)}}, [3])


def test_defaults():
    loss = Squared()
    assert loss.tensor_keys == Squared.default_keys()
    assert [field.name for field in fields(loss.default_keys)] == ["prediction", "target"]
    assert loss.in_keys == ["prediction", ("next", "target")]
    assert loss.out_keys == ["loss_squared"]


def test_set_keys_renames_and_none_restores():
    loss, td = Squared(), batch()
    td.rename_key_("prediction", ("deep", "down", "p"))
    loss.set_keys(prediction=("deep", "down", "p"))
    assert loss.tensor_keys.prediction == ("deep", "down", "p")
    assert loss.tensor_keys.target == ("next", "target")
    assert loss.in_keys == [("deep", "down", "p"), ("next", "target")]
    assert loss(td)["loss_squared"] == 1
    loss.set_keys(prediction=None)
    assert loss.tensor_keys == Squared.default_keys()
    assert Squared().tensor_keys == Squared.default_keys(), "keys belong to one loss"


def test_set_keys_refuses_unknown_names_and_changes_nothing():
    loss = Squared()
    match = r"Squared.set_keys: each name must be one of \['prediction', 'target'\], got 'predicted'. .*'prediction'\?"
    with pytest.raises(ValueError, match=match):
        loss.set_keys(target="other", predicted="x")
    assert loss.tensor_keys == Squared.default_keys()


@pytest.mark.parametrize("key", [3, (), ("a", 1), ["a", 3], torch.ones(1)])
def test_set_keys_refuses_what_cannot_be_a_key(key):
    with pytest.raises(TypeError, match=r"Squared.set_keys: target must be a string or a tuple of strings, got"):
        Squared().set_keys(target=key)


def test_in_keys_can_be_replaced():
    loss = Squared()
    loss.in_keys = [("next", "target"), "prediction"]
    assert loss.in_keys == [("next", "target"), "prediction"]
    assert loss(torch.zeros(3), torch.full((3,), 2.0)) == 4
    assert Squared().in_keys == ["prediction", ("next", "target")]


def test_calls_with_a_tensordict_with_positions_and_with_keywords_agree():
    loss, td = Squared(), batch()
    one, zero = td["prediction"], td["next", "target"]
    assert loss(td)["loss_squared"] == 1
    assert loss(tensordict=td)["loss_squared"] == 1
    assert loss(one, zero) == 1
    assert loss(one, next_target=zero) == 1
    assert loss(prediction=one, next_target=zero) == 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda loss: loss(batch(), torch.ones(3)), "a TensorDict must be the only argument, got 1 more"),
        (lambda loss: loss(batch(), target=torch.ones(3)), "a TensorDict must be the only argument, got 1 more"),
        (lambda loss: loss(3), r"the first argument must be a TensorDict, or the tensors \['prediction', .*got int 3"),
        (lambda loss: loss({"prediction": 1}), r"the first argument .* got dict\. Did you mean TensorDict\(\.\.\.\)\?"),
        (
            lambda loss: loss(next_targe=torch.ones(3)),
            r"each keyword must be one of \['prediction', 'next_target'\], got 'next_targe'\. .*'next_target'\?",
        ),
        (
            lambda loss: loss(torch.ones(3), prediction=torch.ones(3)),
            r"each keyword must be one of \['next_target'\], got 'prediction'",
        ),
        (
            lambda loss: loss(torch.ones(3), torch.ones(3), torch.ones(3)),
            r"the arguments must be at most \['prediction', 'next_target'\], got 3 tensors",
        ),
    ],
)
def test_calls_that_name_no_entry_are_refused(call, match):
    with pytest.raises(TypeError, match=rf"^Squared: {match}"):
        call(Squared())


def test_a_missing_entry_says_what_is_there_and_how_to_rename():
    td = batch().exclude(("next", "target"))
    match = (
        r"^Squared: tensordict must be one with \('next', 'target'\), got keys \['prediction'\]. "
        r"It is what the prediction is compared with. Another name is set by set_keys\(target=...\)."
    )
    with pytest.raises(KeyError, match=match):
        Squared()(td)
    with pytest.raises(KeyError, match=r"set_keys\(target=...\)"):
        Squared()(prediction=torch.ones(3))


def test_reset_parameters_recursive():
    loss = Squared()
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    loss.reset_parameters_recursive()
    for name, p in loss.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_copies_keep_their_own_keys():
    loss = Squared()
    loss.set_keys(target="t")
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.tensor_keys.target == "t"
        other.set_keys(target="u")
        assert loss.tensor_keys.target == "t"


def test_a_base_without_a_loss_says_so():
    for call in (lambda loss: loss(batch()), lambda loss: loss.functional(), lambda loss: loss.in_keys):

        class Empty(LossModule):
            default_keys = Squared.default_keys

        with pytest.raises(NotImplementedError):
            call(Empty())
