"""The means of an evaluation's figures, for evaluate.py: those of METRICS over all ranks, and the accuracy by level."""


def means_of(metrics, answers, problems, dist):
    """METRICS, a rank's answers, and the problems of all ranks -> {name: the mean over the problems that have this
    figure}, without the metrics that none of them has."""
    counts = {name: sum(map(metric.of_problem, problems)) for name, metric in metrics.items()}
    measured = {name: metrics[name] for name, count in counts.items() if count}
    sums = [sum(m.of(a) for a in answers if m.of_problem(a.problem)) for m in measured.values()]
    return {name: total / counts[name] for name, total in zip(measured, dist.sum(*sums), strict=True)}


def means_of_levels(verdicts, problems):
    """A verdict on each of the problems -> {level: their mean}, the levels in order."""
    by_level = {}
    for level in sorted({p.level for p in problems}):
        of_level = [verdict for verdict, p in zip(verdicts, problems, strict=True) if p.level == level]
        by_level[level] = sum(of_level) / len(of_level)
    return by_level
