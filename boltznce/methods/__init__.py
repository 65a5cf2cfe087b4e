"""The methods. A method is a module, named by ``method._target_`` of a config, with

``STAGES``: name -> function of a `Workspace`, in order;
``summary``: of a `Workspace`, the report in a few lines;
``load_models``: of a run's folder, config, system and device, the trained models; ``of(member)`` a `drawing.Generator`.
"""
