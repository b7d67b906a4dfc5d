"""Losses of one tensor against its target, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxfuse.pytorch.training.scores import Scores

TEMPERATURE = 2.0
"""What scores are divided by before a student is held against its teacher."""

SampleLoss = Callable[[Tensor, Tensor, int], Tensor]
"""The losses (samples,) of a tensor, its target and the number of samples; (1,) where there is no axis of
samples."""


def _by_sample(losses: Tensor, samples: int) -> Tensor:
    """The mean of each sample, or of everything where the first axis doesn't count samples."""
    if losses.ndim and len(losses) == samples:
        return losses.reshape(samples, -1).mean(1)
    return losses.mean().reshape(1)


def cross_entropy(scores: Scores) -> SampleLoss:
    """The cross-entropy against class numbers, which may have axes of size 1."""

    def loss(output: Tensor, labels: Tensor, samples: int) -> Tensor:
        logits = scores.read(output).movedim(scores.axis, -1)
        classes = logits.shape[-1]
        flat = F.cross_entropy(
            logits.reshape(-1, classes), labels.reshape(-1).to(torch.int64), reduction="none"
        )
        return _by_sample(flat.reshape(logits.shape[:-1]), samples)

    return loss


def softened_divergence(ours: Scores, theirs: Scores) -> SampleLoss:
    """The Kullback-Leibler divergence from the teacher's softened classes, times the squared temperature."""

    def loss(output: Tensor, target: Tensor, samples: int) -> Tensor:
        student = F.log_softmax(ours.read(output) / TEMPERATURE, dim=ours.axis)
        teacher = F.log_softmax(theirs.read(target) / TEMPERATURE, dim=theirs.axis)
        found = F.kl_div(student, teacher, reduction="none", log_target=True).sum(ours.axis)
        return _by_sample(found * TEMPERATURE**2, samples)

    return loss


def squared_error(scale: float = 1.0) -> SampleLoss:
    """The mean squared error over `scale`; the target may lack or have axes of size 1."""

    def loss(output: Tensor, target: Tensor, samples: int) -> Tensor:
        return _by_sample((output.float() - target.reshape(output.shape).float()).square() / scale, samples)

    return loss
