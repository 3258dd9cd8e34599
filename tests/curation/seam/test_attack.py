"""The search: inside its budget, never downhill, as good as trying everything."""

import itertools

import numpy as np
import pytest

from rlhf_jax.curation.seam.attack import Attack, Flip, Found, attack

LENGTH, VOCAB = 5, 4


class World:
    """Rewards of completions of LENGTH tokens; proposes every flip, or some of them."""

    def __init__(self, seed=0, pairs=0.0):
        rng = np.random.default_rng(seed)
        self.single = rng.normal(size=(2, LENGTH, VOCAB))
        self.pair = pairs * rng.normal(size=(2, LENGTH, VOCAB, VOCAB))
        self.asked = []

    def reward(self, index, tokens):
        each = sum(self.single[index, t, v] for t, v in enumerate(tokens))
        both = sum(
            self.pair[index, t, v, w]
            for t, (v, w) in enumerate(itertools.pairwise(tokens))
        )
        return float(each + both)

    def propose(self, asked):
        self.asked.append(list(asked))
        return [
            [
                Flip(t, v, self.reward(index, (*tokens[:t], v, *tokens[t + 1 :])))
                for t in range(LENGTH)
                for v in range(VOCAB)
                if v != tokens[t]
            ]
            for index, tokens in asked
        ]

    def attack(self, budgets, **options):
        starts = [(0,) * LENGTH, (1,) * LENGTH]
        rewards = [self.reward(n, start) for n, start in enumerate(starts)]
        found = attack(starts, rewards, self.propose, budgets=budgets, **options)
        return starts, rewards, [[*each.raised, *each.failed] for each in found]


@pytest.mark.parametrize("budget", [1, 2, 3, LENGTH])
def test_greedy_search_is_optimal_for_a_reward_of_single_tokens(budget):
    world = World()
    starts, _, found = world.attack([budget, budget])
    for index, start in enumerate(starts):
        best = max(
            world.reward(index, tokens)
            for tokens in itertools.product(range(VOCAB), repeat=LENGTH)
            if 0 < sum(a != b for a, b in zip(tokens, start)) <= budget
        )
        assert found[index][0].reward == pytest.approx(best)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_results_stay_inside_the_budget_and_are_what_they_say(seed, beam):
    world = World(seed, pairs=1.0)
    starts, _, found = world.attack([1, 3], count=10, beam=beam)
    for index, budget in enumerate([1, 3]):
        assert len(found[index]) == 10
        for each in found[index]:
            edits = sum(a != b for a, b in zip(each.tokens, starts[index]))
            assert edits == each.edits and 1 <= edits <= budget
            assert each.reward == pytest.approx(world.reward(index, each.tokens))
        values = [each.reward for each in found[index]]
        assert values == sorted(values, reverse=True)
        assert len({each.tokens for each in found[index]}) == 10


@pytest.mark.parametrize("seed", range(5))
def test_a_search_goes_on_only_from_rewards_that_rose(seed):
    world = World(seed, pairs=1.0)
    _, rewards, found = world.attack([4, 4])
    asked = [tokens for round_ in world.asked for index, tokens in round_ if index == 0]
    path = [world.reward(0, tokens) for tokens in asked]
    assert path[0] == rewards[0]
    assert all(a < b for a, b in itertools.pairwise(path))
    assert max(found[0][0].reward, rewards[0]) >= path[-1]


@pytest.mark.parametrize("seed", range(5))
def test_a_wider_beam_and_a_larger_budget_find_no_less_of_two_rounds(seed):
    best = {
        (beam, budget): World(seed, pairs=2.0).attack([budget, 0], beam=beam)[2][0][0]
        for beam in (1, VOCAB * LENGTH)
        for budget in (1, 2)
    }
    narrow, wide = 1, VOCAB * LENGTH
    assert best[wide, 2].reward >= best[narrow, 2].reward
    for beam in (narrow, wide):
        assert best[beam, 2].reward >= best[beam, 1].reward


@pytest.mark.parametrize("beam", [1, 3])
def test_an_attack_never_lowers_the_reward_it_maximises(beam):
    """What it did not raise is told apart, whatever the rewards."""
    for seed in range(20):
        world = World(seed, pairs=1.0)
        # The best start of all, and one of the others.
        best = max(
            itertools.product(range(VOCAB), repeat=LENGTH),
            key=lambda tokens: world.reward(0, tokens),
        )
        for start in (best, (seed % VOCAB,) * LENGTH):
            base = world.reward(0, start)
            (found,) = attack(
                [start], [base], world.propose, budgets=[2], count=20, beam=beam
            )
            assert all(each.reward > base for each in found.raised)
            assert all(each.reward <= base for each in found.failed)
            assert 15 <= len(found.raised) + len(found.failed) <= 20
            assert not (found.raised and start == best)


def test_a_start_that_cannot_be_raised_stays_the_best():
    (found,) = attack([(1,)], [5.0], lambda asked: [[Flip(0, 2, 1.0)]], budgets=[1])
    assert found == Attack([], [Found((2,), 1.0, 1)])


def test_what_is_not_accepted_is_neither_a_result_nor_searched_from():
    world = World(pairs=1.0)

    def accept(index, tokens):
        return tokens[0] == index

    _, _, found = world.attack([4, 4], count=30, beam=2, accept=accept)
    for index in (0, 1):
        assert found[index] and all(each.tokens[0] == index for each in found[index])
    asked = [one for round_ in world.asked for one in round_]
    assert all(tokens[0] == index for index, tokens in asked)


def test_no_budget_and_no_proposal_give_nothing():
    world = World()
    assert world.attack([0, 0])[2] == [[], []] and not world.asked
    found = attack([(1,)], [0.0], lambda asked: [[] for _ in asked], budgets=[1])
    assert found == [Attack([], [])]
