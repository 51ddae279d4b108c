"""`stochca domainbed`: leave one domain out, fine-tune on the others, compare methods on the one left out."""

from stochca.domainbed.command import DomainBedInterrupted, domainbed

__all__ = ["DomainBedInterrupted", "domainbed"]
