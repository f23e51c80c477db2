"""Fused kernels for reinforcement learning on long chains of thought.

Log-probabilities, policy losses, group advantages. Needs torch alone; triton is used when it is
installed and a GPU is there.
"""

from r1kernels.advantages import group_advantages
from r1kernels.attention_interface import register_attention
from r1kernels.backend import batch_invariant, use_backend
from r1kernels.balance import balance, pack_by_budget
from r1kernels.check import IGNORE
from r1kernels.host_store import HostStore
from r1kernels.linear_logp import linear_logp
from r1kernels.linear_loss import linear_loss
from r1kernels.linear_policy_loss import linear_policy_loss
from r1kernels.model_shape import ModelShape
from r1kernels.objective import PolicyObjective
from r1kernels.offloaded_checkpoint import checkpoint_layers, offloaded_checkpoint
from r1kernels.patch import patch, unpatch
from r1kernels.policy_loss import policy_loss
from r1kernels.prefix_attention import prefix_attention
from r1kernels.reference.policy_loss import PolicyLoss
from r1kernels.reference.token_logp import Logp
from r1kernels.shared_prefixes import SharedPrefixes, share_prefixes
from r1kernels.stream_layer import stream_layer
from r1kernels.stream_model import stream_model
from r1kernels.tile_mlps import tile_mlps
from r1kernels.tiled_mlp import tiled_mlp
from r1kernels.token_logp import token_logp
from r1kernels.varlen_attention import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "IGNORE",
    "HostStore",
    "Logp",
    "ModelShape",
    "PolicyLoss",
    "PolicyObjective",
    "SharedPrefixes",
    "__version__",
    "balance",
    "batch_invariant",
    "checkpoint_layers",
    "group_advantages",
    "linear_logp",
    "linear_loss",
    "linear_policy_loss",
    "offloaded_checkpoint",
    "pack_by_budget",
    "patch",
    "policy_loss",
    "prefix_attention",
    "register_attention",
    "share_prefixes",
    "stream_layer",
    "stream_model",
    "tile_mlps",
    "tiled_mlp",
    "token_logp",
    "unpatch",
    "use_backend",
    "varlen_attention",
]
