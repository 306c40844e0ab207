"""What every number in a report means, in one sentence each."""

from __future__ import annotations

DEFINITIONS = {
    "bits per byte": "loss in bits over all text tokens, divided by the text's UTF-8 bytes; unlike perplexity it can "
    "be compared between tokenizers",
    "row 0": "the untouched base, measured before anything was added to it",
    "L[i, j]": "bits per byte on domain j after stage i; S is the last stage",
    "forgetting.base": "mean of L[S, j] − L[0, j] over the base's domains: what growing cost its user",
    "forgetting.first_last": "mean over old j of L[S, j] − L[stage j was learned in, j]",
    "forgetting.max": "mean over old j of L[S, j] − lowest L[l, j] of the stages l < S; below 0 where the last is best",
    "forgetting.max_incl_last": "the same with l ≤ S; never below 0",
    "bwt.gem": "mean over old j of L[stage j was learned in, j] − L[S, j]: backward transfer, above 0 is good",
    "bwt.pairs": "mean over all pairs of an old j and a later stage i of L[stage of j, j] − L[i, j]",
    "fwt.gem": "mean over the domains learned in stage 2 or later of row 0 − the loss just before learning them",
    "fwt.raw": "mean over the same domains of the loss just before learning them, against no baseline",
    "fwt.vs_independent": "mean over the same domains of an independent model's loss − the loss when learned here",
    "average_incremental": "mean over stages of the mean loss on all domains trained so far",
    "intransigence.joint": "mean of the loss when learned − that of a model trained on all domains at once",
    "intransigence.independent": "mean of the loss when learned − that of a model trained on that domain alone",
    "min_acc": "mean over old j of the highest loss measured on j inside or at the end of any later stage",
    "wc_acc": "the same, with the newest domains' own losses in the mean",
    "stability_gap.depth": "how far a loss rose inside a later stage above where that stage started",
    "stability_gap.recovery": "share of that rise which was gone by the end of its stage",
    "routing.drift": "Jensen–Shannon divergence (nats) of old domains' expert choices, when learned against now",
    "routing.share_new": "share of old domains' tokens that reach an expert of a growth",
    "gate.false_open": "share of old domains' tokens on which a later generation's gate is above 0",
    "gate.false_close": "share of a generation's own tokens on which its gate is below 1",
    "gate.lag": "tokens of a document until the gate has settled, on average",
    "learned": "mean of L[i−1, j] − L[i, j] over the domains j learned in stage i",
    "bystander": "mean of L[S, j] − L[0, j] over domains that were never trained",
    "average": "mean of the last row over the trained domains",
    "95 % interval": "paired bootstrap over documents: both models score the same documents, drawn with replacement",
    "95 % interval over seeds": "Student's t over runs that differ only in their seed; one run has no interval",
    "ratio of forgetting": "mean forgetting of the setting divided by the reference's, both on the same seeds",
    "Pareto front": "the settings that no other beats in both forgetting and learning",
    "gate open": "share of a domain's tokens for which the new generation's gate is above 0; fully open means 1",
}
DIRECTIONS = {"lower is better": "lower", "higher is better": "higher"}
