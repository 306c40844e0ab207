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
