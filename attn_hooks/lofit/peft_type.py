"""Our names in PEFT, whose list of methods is a closed enum without entry points."""

from __future__ import annotations

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from attn_hooks.errors import error


def register(name: str, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Adds the method to PEFT; leaves it alone where a method of that name is there already."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    # An enum's own __setattr__ refuses members.
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class)


def own_peft_type(name: str, config_class: type[PeftConfig]) -> PeftType:
    """``PeftType[name]``; raises ``AttnHooksError`` where PEFT reads that name as somebody else's method."""
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name])
    if owner is not config_class:
        raise error("foreign-lofit", name=name, version=peft.__version__, owner=owner)
    return PeftType[name]
