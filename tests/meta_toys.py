"""Settings of meta-training from one list of options; shared by the tests of estimators."""

from dataclasses import fields

from odeopt.meta import Backpropagation, EvolutionStrategies, Hybrid, MetaConfig, MetaObjective


def configured(estimator=Backpropagation, **options):
    """Settings of a training, among them options of an estimator's class and of the meta-loss by their names."""

    def taken(kind):
        names = {field.name for field in fields(kind)} - {field.name for field in fields(MetaConfig)}
        return {name: options.pop(name) for name in list(options) if name in names}

    own = {"evolution": EvolutionStrategies(**taken(EvolutionStrategies))} if estimator is Hybrid else {}
    own |= taken(estimator)
    return MetaConfig(estimator=estimator(**own), objective=MetaObjective(**taken(MetaObjective)), **options)
