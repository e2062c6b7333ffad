"""The contracts: card, method, budget, selection, site, record, artefact, registry, errors, random streams."""
