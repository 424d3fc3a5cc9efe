"""What the cube does when an instance starts."""

from cubicweb.server.hook import Hook

from cubicweb_s3storage.values import select_together


class SelectTogetherHook(Hook):
    """Has the values that one query selects load beside each other."""

    __regid__ = "s3storage.select-together"
    events = ("server_startup", "server_maintenance")

    def __call__(self) -> None:
        select_together(self.repo.system_source)
