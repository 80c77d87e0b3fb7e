"""Train some models side by side, and choose the best."""

import random
from collections.abc import Callable

from pydantic import BaseModel

from pgflow_prefect import Workflow

workflow = Workflow("training")


class Trained(BaseModel):
    rate: float
    loss: float


@workflow.step
def split(payload: dict[str, int]) -> list[float]:
    generator = random.Random(payload.get("seed", 1))  # noqa: S311  no secret
    return [generator.random() for _ in range(50)]


def make_trainer(rate: float) -> Callable[[list[float]], Trained]:
    def train(split: list[float]) -> Trained:
        guess = 0.0
        for value in split:
            guess += rate * (value - guess)
        mean = sum(split) / len(split)
        return Trained(rate=rate, loss=abs(guess - mean))

    return train


for number, rate in enumerate([0.01, 0.1, 0.5, 0.9]):
    workflow.step(f"train-{number}", retries=1)(make_trainer(rate))


@workflow.step(after=[f"train-{number}" for number in range(4)])
def choose(upstream: dict[str, Trained]) -> Trained:
    return min(upstream.values(), key=lambda each: each.loss)


flow = workflow.flow
