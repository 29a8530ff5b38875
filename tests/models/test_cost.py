"""What work is said to take, from configs alone."""

import pytest

from mixturelens.models import Budget, Pair
from mixturelens.models.cost import Estimate, Work, check_memory, estimate, said_time, size_of
from mixturelens.suite import load_suite
from mixturelens.types import InputError


@pytest.fixture(scope="module")
def pair(pairs) -> Pair:
    return Pair(pairs / "llama" / "S", pairs / "llama" / "R-routing", load_suite(pairs / "llama"))


def test_size_counts_what_the_model_has(pair):
    model = pair.model("before")
    size = size_of(pair)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    words = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert size.body == size.parameters - words * (1 if tied else 2)
    assert size.unembedding == words
    assert size.weights == 4 * size.parameters
    assert (size.layers, size.d_model) == (model.config.num_hidden_layers, model.config.hidden_size)


def test_work_adds_up_one_after_the_other():
    both = Work(tokens=10, read=1, models=2, held=5) + Work(tokens=5, back=2, models=3, held=1)
    assert both == Work(tokens=15, back=2, read=1, models=3, held=5)


def test_a_backward_costs_two_forwards_of_time(pair):
    forward, back = (estimate(pair, work) for work in (Work(tokens=1000), Work(back=1000)))
    assert back.seconds == pytest.approx(2 * forward.seconds)


def test_memory_grows_by_a_set_of_weights(pair):
    one, two = (estimate(pair, Work(models=n)).memory for n in (1, 2))
    assert two - one == size_of(pair).weights


def test_work_that_is_little_is_not_said_to_take_seconds():
    """A small model's forwards take a second, and what is made of them takes a minute."""
    assert str(Estimate(1.0, 0.9e9)) == "a few minutes, at most 0.9 GB"
    assert str(Estimate(60.0, 0.9e9)) == "about 60 s, at most 0.9 GB"


def test_what_does_not_fit_is_refused_before_it_is_loaded(pair):
    pair = Pair(pair.before, pair.after, pair.suite, budget=Budget(memory=1))
    check_memory(pair, Estimate(1.0, 0.9e9), "patching")
    with pytest.raises(InputError, match=r"patching needs 1.5 GB, and --memory allows 1: allow more"):
        check_memory(pair, Estimate(1.0, 1.5e9), "patching")


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "about 1 s"), (99, "about 99 s"), (100, "about 2 min")])
def test_times_are_said_as_people_say_them(seconds, said):
    assert said_time(seconds) == said
