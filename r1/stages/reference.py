"""The frozen policy that the KL term measures from."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_model, save_model

from r1.batch import Minibatch
from r1.stages.session import Session

FILE = "reference.safetensors"


class Reference:
    """A copy of the policy, refreshed at rollout boundaries every `refresh_every` optimizer steps
    (0: never).

    A resumed run takes it from the checkpoint.
    """

    def __init__(self, session: Session, refresh_every: int):
        self.trainer = session.trainer
        self.refresh_every = refresh_every
        self.refreshed_at = 0
        self.model = session.model.frozen_copy()
        if session.state is not None:
            self.refreshed_at = session.state["reference_refreshed_at"]
            load_model(
                self.model.module, session.checkpoint / FILE, device=str(session.model.device)
            )

    def score(self, part: Minibatch) -> Minibatch:
        """The minibatch with the reference's log-probabilities in its packs."""
        scores = self.trainer.score(part.packs, self.model)
        packs = [
            replace(pack, logp_ref_T=one.logp_T)
            for pack, one in zip(part.packs, scores, strict=True)
        ]
        return replace(part, packs=packs)

    def maybe_refresh(self) -> int:
        """Copy the policy when it is due; returns the optimizer steps since the last copy."""
        if self.refresh_every and self.trainer.updates - self.refreshed_at >= self.refresh_every:
            self.model.module.load_state_dict(self.trainer.model.module.state_dict())
            self.refreshed_at = self.trainer.updates
        return self.trainer.updates - self.refreshed_at

    def state_dict(self) -> dict[str, int]:
        return {"reference_refreshed_at": self.refreshed_at}

    def save(self, folder: Path) -> None:
        save_model(self.model.module, str(folder / FILE))
