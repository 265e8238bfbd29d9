"""One-shot entropy minimisation and its kin on any transformers causal language model."""

from em_kernels.lm.data import ONE_SHOT_PROMPT
from em_kernels.lm.heads import ModelError
from em_kernels.lm.lock import InUseError
from em_kernels.lm.models import load_model
from em_kernels.lm.problems import read_prompts
from em_kernels.lm.ranks import LostRankError, RankError
from em_kernels.lm.rollout import Rollout, Sampling, sample
from em_kernels.trainer.checkpoint import merge_checkpoint, read_config
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.entropy_update import Objective
from em_kernels.trainer.loop import TrainResult, train
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.state import CheckpointError
from em_kernels.trainer.vllm_sampler import EngineError

__all__ = [
    "ONE_SHOT_PROMPT",
    "CheckpointError",
    "EngineError",
    "InUseError",
    "LostRankError",
    "ModelError",
    "Objective",
    "RLConfig",
    "RankError",
    "Rollout",
    "Sampling",
    "TrainConfig",
    "TrainResult",
    "load_model",
    "merge_checkpoint",
    "read_config",
    "read_prompts",
    "sample",
    "train",
]
