"""What the cube does when an instance starts."""

from cubicweb.server.hook import Hook

from cubicweb_s3storage.values import leave_unread, select_together


class LazyValuesHook(Hook):
    """Has values load beside each other, and only when they are used."""

    __regid__ = "s3storage.lazy-values"
    events = ("server_startup", "server_maintenance")

    def __call__(self) -> None:
        select_together(self.repo.system_source)
        leave_unread(self.repo.system_source)
