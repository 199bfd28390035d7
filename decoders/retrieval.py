"""Retrieve or draw: whether a picture of a given index answers as well as a new one, and which.

From GILL (arXiv 2305.17216). A linear layer behind dropout decides from the hidden state at the first voken; the
states of all vokens and features of pictures (of any frozen encoder) meet in one space, trained by InfoNCE in both
directions with a learned temperature, so that the nearest picture of an index is the one that was meant. Deviation:
GILL maps each retrieval token; here the mean over the vokens is mapped, which does not depend on their number.

    head = RetrievalHead(hidden_dim=1024, picture_dim=768)
    index = head.index(features, keys)
    for answer in head.choose(states, index): ...           # Retrieved(key="cat.png", ...) or Draw(...)

Dimension key: B samples, N vokens, D width of hidden states, P of picture features, E of the common space, I pictures
of an index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_mm.codes import fingerprint_of
from tokenizers_mm.errors import CheckpointError, InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RETRIEVE, DRAW = 0, 1
"""Labels of a decision."""
START_TEMPERATURE, HIGHEST_SCALE = 0.07, 100.0
"""CLIP's (arXiv 2103.00020)."""


@dataclass(frozen=True)
class Retrieved:
    """A picture of the index answers."""

    key: str
    similarity: float
    """Cosine, -1 to 1."""
    probability: float
    """That retrieving is right."""


@dataclass(frozen=True)
class Draw:
    """A new picture is to be drawn."""

    probability: float
    """That drawing is right."""


@dataclass(frozen=True, eq=False)
class PictureIndex:
    """Pictures in the common space of one head."""

    keys: tuple[str, ...]
    embeds_IE: Tensor
    """Of length one."""
    head: str
    """Fingerprint of the head that made it: another head's space is another."""

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; keys are in its metadata."""
        facts = {"keys": json.dumps(self.keys, ensure_ascii=False), "head": self.head}
        save_file({"embeds": self.embeds_IE.contiguous()}, path, metadata=facts)

    @classmethod
    def load(cls, path: Path | str) -> PictureIndex:
        """What `save` wrote.

        Raises:
            CheckpointError: not such a file, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts, embeds_IE = file.metadata(), file.get_tensor("embeds")
            keys = tuple(str(key) for key in json.loads(facts["keys"]))
            head = facts["head"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not an index of pictures: {error}") from error
        if embeds_IE.ndim != 2 or len(keys) != len(embeds_IE):
            raise CheckpointError(f"{path} is damaged: {len(keys)} keys for embeddings {tuple(embeds_IE.shape)}")
        return cls(keys, embeds_IE, head)


class RetrievalHead(nn.Module):
    """Scores whether to retrieve or to draw, and ranks the pictures of an index.

    Args:
        hidden_dim: width of the transformer's hidden states.
        picture_dim: width of a picture's features.
        embed_dim: of the common space.
        drop: dropout in front of the decision.
    """

    def __init__(self, *, hidden_dim: int, picture_dim: int, embed_dim: int = 256, drop: float = 0.5) -> None:
        super().__init__()
        self.sizes = {"hidden_dim": hidden_dim, "picture_dim": picture_dim, "embed_dim": embed_dim, "drop": drop}
        self.decision = nn.Sequential(nn.Dropout(drop), nn.Linear(hidden_dim, 2))
        self.of_states = nn.Linear(hidden_dim, embed_dim)
        self.of_pictures = nn.Linear(picture_dim, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))

    # -- the two spaces

    def queries(self, states_BND: Tensor) -> Tensor:
        """What vokens look for: B x E, of length one."""
        return F.normalize(self.of_states(states_BND.mean(1)), dim=-1)

    def pictures(self, features_BP: Tensor) -> Tensor:
        """Where pictures lie: B x E, of length one."""
        return F.normalize(self.of_pictures(features_BP), dim=-1)

    def decide(self, states_BND: Tensor) -> Tensor:
        """Logits of retrieving and of drawing: B x 2."""
        return self.decision(states_BND[:, 0])

    # -- training

    def contrastive_loss(self, states_BND: Tensor, features_BP: Tensor, same_B: Tensor | None = None) -> Tensor:
        """InfoNCE from vokens to pictures and back, mean of both.

        Args:
            states_BND: hidden states at the vokens.
            features_BP: of the picture that each row means.
            same_B: a number for each picture; rows of equal numbers mean the same one: no negatives of each other.
        """
        scale = self.log_scale.exp().clamp(max=HIGHEST_SCALE)
        logits_BB = scale * self.queries(states_BND) @ self.pictures(features_BP).T
        number_B = torch.arange(len(logits_BB), device=logits_BB.device)
        if same_B is not None:
            is_same_BB = (same_B[:, None] == same_B[None]) & ~torch.eye(
                len(same_B), dtype=torch.bool, device=same_B.device
            )
            logits_BB = logits_BB.masked_fill(is_same_BB, -torch.inf)
        return (F.cross_entropy(logits_BB, number_B) + F.cross_entropy(logits_BB.T, number_B)) / 2

    def decision_loss(self, states_BND: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy of the decision; labels are `RETRIEVE` and `DRAW`, or -100 where it is open (GILL's `same`)."""
        losses_B = F.cross_entropy(self.decide(states_BND), labels_B, reduction="none")
        return losses_B.sum() / (labels_B != -100).sum().clamp(min=1)

    # -- answering

    @property
    def fingerprint(self) -> str:
        """Changes with the map of pictures into the common space."""
        weights = {n: p.detach().float().cpu().numpy() for n, p in self.of_pictures.named_parameters()}
        return fingerprint_of({"picture_dim": self.sizes["picture_dim"]}, weights)

    @torch.no_grad()
    def index(self, features_IP: Tensor, keys: Sequence[str]) -> PictureIndex:
        """An index of pictures.

        Raises:
            InputError: as many keys as pictures are needed, and features of the head's width.
        """
        if features_IP.ndim != 2 or features_IP.shape[1] != self.sizes["picture_dim"] or len(keys) != len(features_IP):
            raise InputError(
                f"an index needs features of {self.sizes['picture_dim']} and a key for each picture; "
                f"got features {tuple(features_IP.shape)} and {len(keys)} keys"
            )
        return PictureIndex(tuple(keys), self.pictures(features_IP).cpu(), self.fingerprint)

    @torch.no_grad()
    def rank(self, states_BND: Tensor, index: PictureIndex) -> Tensor:
        """Cosine similarity of every picture of the index: B x I.

        Raises:
            InputError: the index has another width, or is another head's.
        """
        if index.embeds_IE.shape[1] != self.sizes["embed_dim"]:
            raise InputError(
                f"the index holds embeddings of {index.embeds_IE.shape[1]}, this head's have "
                f"{self.sizes['embed_dim']}: make the index anew with this head"
            )
        if index.head != self.fingerprint:
            raise InputError("the index was made by another head, or before its last training: make it anew")
        queries_BE = self.queries(states_BND)
        return queries_BE @ index.embeds_IE.to(queries_BE).T

    @torch.no_grad()
    def choose(
        self, states_BND: Tensor, index: PictureIndex, *, threshold: float = 0.5, best: int = 1
    ) -> list[list[Retrieved] | Draw]:
        """For each row, `Draw`, or the nearest pictures, nearest first.

        Args:
            states_BND: hidden states at the vokens.
            index: of this head; an empty one always draws.
            threshold: least probability of retrieving at which pictures are retrieved.
            best: how many of them.
        """
        was_training = self.training
        self.eval()  # a decision must not fall by dropout
        retrieve_B = self.decide(states_BND).softmax(-1)[:, RETRIEVE].tolist()
        scores_BI = self.rank(states_BND, index)
        self.train(was_training)
        answers: list[list[Retrieved] | Draw] = []
        for probability, scores_I in zip(retrieve_B, scores_BI, strict=True):
            if probability < threshold or not index.keys:
                answers.append(Draw(1 - probability))
                continue
            found = scores_I.topk(min(best, len(index.keys)))
            pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            answers.append([Retrieved(index.keys[place], score, probability) for place, score in pairs])
        return answers

    # -- saving

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.sizes, indent=1) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path | str) -> RetrievalHead:
        """What `save` wrote, in evaluation mode.

        Raises:
            CheckpointError: not such a folder, or weights that do not fit its config.
        """
        folder = Path(folder)
        try:
            head = cls(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            head.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} does not hold a retrieval head: {error}") from error
        return head.eval()
