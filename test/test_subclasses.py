"""Subclasses written for cubicweb-s3storage 4.x go on working."""

import hashlib

from cubicweb import Binary

import s3server
from cubicweb_s3storage.errors import AccessRefused
from cubicweb_s3storage.storages import S3AddFileOp, S3DeleteFileOp, S3Storage
from testlib import S3TC, OwnKeyStorage


class OwnUploadStorage(S3Storage):
    """Writes by itself, as the body of 4.x's `entity_added` does."""

    def entity_added(self, entity, attr):
        binary = entity.cw_edited.pop(attr)
        key = self.new_s3_key(entity, attr)
        upload_key = key
        if entity._cw.repo.config["s3-transaction-suffix-key"]:
            upload_key = self.suffixed_key(key)
        answer = self.s3cnx.put_object(
            Bucket=self.bucket, Key=upload_key, Body=binary.getvalue()
        )
        self.save_s3_key(entity, attr, upload_key, answer.get("VersionId"))
        data = (self, key, entity.eid, attr)
        S3AddFileOp.get_instance(entity._cw).add_data(data)
        return binary


class OwnUploadTC(S3TC):
    storage_class = OwnUploadStorage

    def check(self):
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, b"content").eid
            cnx.commit()
            self.create(cnx, b"another")
            cnx.rollback()
        self.assertEqual(self.read(eid), b"content")
        self.assertEqual(list(self.objects().values()), [b"content"])
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.read(eid), b"new")
        self.assertEqual(list(self.objects().values()), [b"new"])

    def test_by_default(self):
        self.check()

    def test_with_suffixes(self):
        self.set_option("s3-transaction-suffix-key", True)
        self.check()
        (key,) = self.objects()
        self.assertRegex(key, r"^\w{8}-\w{4}-\w{4}-\w{4}-\w{12}$")

    def test_with_versions(self):
        self.keep_versions()
        self.check()


class RegistersAgainStorage(OwnKeyStorage):
    def entity_added(self, entity, attr):
        binary = super().entity_added(entity, attr)
        data = (self, self.new_s3_key(entity, attr), entity.eid, attr)
        S3AddFileOp.get_instance(entity._cw).add_data(data)
        return binary


class RegistersAgainTC(S3TC):
    storage_class = RegistersAgainStorage

    def test_an_upload_counts_once(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})


class OwnUploadByHashStorage(OwnUploadStorage):
    def entity_added(self, entity, attr):
        self.key = hashlib.sha1(entity.cw_edited[attr].getvalue()).hexdigest()
        return super().entity_added(entity, attr)

    def new_s3_key(self, entity, attr):
        return self.key


class OwnUploadByHashTC(S3TC):
    storage_class = OwnUploadByHashStorage

    def test_rows_share_an_object(self):
        for stages_every_write in (False, True):
            self.set_option("s3-transaction-suffix-key", stages_every_write)
            first, second = self.committed(b"content"), self.committed(b"content")
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(first).cw_delete()
                cnx.commit()
            self.assertEqual(self.read(second), b"content")
            self.assertEqual(len(self.objects()), 1)


class HashBeforeStorage(S3Storage):
    """Prepares the key before the value is written, which updates do as well."""

    def entity_added(self, entity, attr):
        content = entity.cw_edited[attr]
        if content is not None:
            self.key = hashlib.sha1(content.getvalue()).hexdigest()
        return super().entity_added(entity, attr)

    def new_s3_key(self, entity, attr):
        return self.key


class HashBeforeTC(S3TC):
    storage_class = HashBeforeStorage

    def test_create_and_update(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        key = hashlib.sha1(b"new").hexdigest()
        self.assertEqual(self.objects(), {key: b"new"})


class NeverDeletesStorage(S3Storage):
    def delay_deletion(self, entity, attr, key):
        """Objects are kept."""


class NeverDeletesTC(S3TC):
    storage_class = NeverDeletesStorage

    def test_objects_are_kept(self):
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"1")
            document.cw_set(content=Binary(b"2"))
            cnx.commit()
            document.cw_delete()
            cnx.commit()
        self.assertEqual(sorted(self.objects().values()), [b"1", b"2"])


class TidiesUpStorage(S3Storage):
    """Keeps a thumbnail beside each object."""

    def entity_deleted(self, entity, attr):
        key = self.get_s3_key(entity, attr)
        operation = S3DeleteFileOp.get_instance(entity._cw)
        operation.add_data((self, f"{key}.png", entity.eid, attr))
        super().entity_deleted(entity, attr)


class TidiesUpTC(S3TC):
    storage_class = TidiesUpStorage

    def test_both_objects_go(self):
        eid = self.committed(b"content")
        self.put(f"{self.row(eid)}.png", b"thumbnail")
        self.delete(eid)
        self.assertEqual(self.objects(), {})


class OwnDownloadStorage(S3Storage):
    """Reads by itself; reverses what it reads, as decryption may."""

    def download(self, key, **kwargs):
        answer = self.s3cnx.get_object(Bucket=self.bucket, Key=key, **kwargs)
        content = answer["Body"].read()
        if content == b"broken":
            raise ValueError("cannot decrypt")
        return Binary(content[::-1])


class OwnDownloadTC(S3TC):
    storage_class = OwnDownloadStorage

    def test_values_are_read_with_it(self):
        eid = self.committed(b"abc")
        self.assertEqual(self.read(eid), b"cba")

    def test_staged_values_too(self):
        self.set_option("s3-transaction-suffix-key", True)
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, b"abc").eid
            cnx.drop_entity_cache()
            self.assertEqual(cnx.entity_from_eid(eid).content.read(), b"cba")

    def test_its_errors_are_explained(self):
        eid = self.committed(b"abc")
        self.client.delete_object(Bucket=self.bucket, Key=self.row(eid))
        with self.assertRaises(FileNotFoundError):
            self.read(eid)
        self.s3.faults.append(s3server.Fault("GET", 403, "AccessDenied"))
        with self.assertRaises(AccessRefused):
            self.read(eid)

    def test_its_own_errors_are_its_own(self):
        eid = self.committed(b"broken")
        with self.assertRaisesRegex(ValueError, "^cannot decrypt$"):
            self.read(eid)


class TitleKeyStorage(S3Storage):
    def new_s3_key(self, entity, attr):
        return f"titles/{entity.cw_edited['title']}"


class TitleKeyTC(S3TC):
    storage_class = TitleKeyStorage

    def test_a_migrated_value_gets_its_key_from_other_attributes(self):
        self.repo.system_source.unset_storage("Document", "content")
        eid = self.committed(b"content", title="deed")
        self.set_storage("Document", "content", self.storage)
        with self.admin_access.repo_cnx() as cnx:
            entity = cnx.execute("Any X, T WHERE X title T").get_entity(0, 0)
            entity.cw_attr_cache["content"] = Binary(b"content")
            self.storage.migrate_entity(entity, "content")
            cnx.commit()
        self.assertEqual(self.row(eid), "titles/deed")
        self.assertEqual(self.read(eid), b"content")
