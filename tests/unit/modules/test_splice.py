# SPDX-License-Identifier: Apache-2.0
"""Speech frames land where the locator was, and prompts end together."""

import pytest
import torch

from nemo_rba.modules.splice import left_pad, splice

LOCATOR = 9


def tokens(ids):
    """Embeddings that show their id: (P, B, 1)."""
    return ids.T[..., None].float()


def call(ids, lens, frames, frame_lens):
    ids = torch.tensor(ids)
    return splice(
        token_embeddings=tokens(ids), prompt_ids=ids, prompt_lens=torch.tensor(lens), frames=torch.tensor(frames),
        frame_lens=torch.tensor(frame_lens), locator_id=LOCATOR,
    )  # fmt: skip


def test_by_hand():
    out, valid = call([[1, LOCATOR, 2, 3], [LOCATOR, 4, 0, 0]], [4, 2], [[[0.1], [0.2]], [[0.3], [99.0]]], [2, 1])
    assert out.shape == (5, 2, 1)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, 0.1, 0.2, 2.0, 3.0]))
    torch.testing.assert_close(out[:, 1, 0], torch.tensor([0.0, 0.0, 0.0, 0.3, 4.0]))
    assert valid.tolist() == [[True] * 5, [False] * 3 + [True] * 2]


def test_padding_of_tokens_and_frames_changes_nothing():
    a = call([[1, LOCATOR, 2]], [3], [[[0.1], [0.2]]], [2])
    b = call([[1, LOCATOR, 2, LOCATOR, 7]], [3], [[[0.1], [0.2], [5.0], [6.0]]], [2])
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("ids", [[[1, 2, 3]], [[LOCATOR, 1, LOCATOR]]])
def test_locator_must_stand_once(ids):
    with pytest.raises(ValueError, match="exactly once"):
        call(ids, [3], [[[0.1]]], [1])


def test_typed_prompts_end_together():
    out, valid = left_pad(tokens(torch.tensor([[1, 2, 3, 7], [4, 0, 0, 7]])), torch.tensor([3, 1]))
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(out[:, 1, 0], torch.tensor([0.0, 0.0, 4.0]))
    assert valid.tolist() == [[True] * 3, [False, False, True]]
