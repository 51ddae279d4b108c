"""Every architecture of timm: driven with timm's own numbers, or refused by name."""

import itertools

from tests.scorecard.row import Case

# One of each way in which architectures differ.
SHORT = (
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva02_small_patch14_224",
    "naflexvit_base_patch16_map",
    "vit_base_patch16_clip_224",
    "vit_large_patch16_sapiens2",
    "vit_small_patch16_rope_mixed_224",
    "vit_so400m_patch14_siglip_224",
)
AT_ONCE = 16


def cases(long):
    if not long:
        return [Case("one-of-each-kind", lambda: _compare(SHORT))]
    from tests.architectures import driven, module_of

    listed = [Case("others-are-refused", _refuse)]
    for module, group in itertools.groupby(sorted(driven(), key=module_of), module_of):
        names = list(group)
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            listed.append(Case(f"{module}-{start}", lambda part=part: _compare(part)))
    return listed


def _compare(names):
    from tests.scorecard.timm_comparison import compare

    return compare(names)


def _refuse():
    from tests.scorecard.timm_comparison import refuse_others

    return refuse_others()
