"""The papermill engine of warm kernels. It imports papermill, which may not happen while papermill itself is imported:
papermill loads the engines of installed packages then."""

from papermill.engines import NBClientEngine


class WarmEngine(NBClientEngine):
    "papermill's own engine with forked kernels: `papermill --engine warm`, inside `warm_server()`."

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        "Execute a notebook in a forked kernel."
        from moe_routing.runs.warm import WarmKernelManager

        super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=WarmKernelManager, **kwargs)
