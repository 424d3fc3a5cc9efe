"""What an operation costs, in requests."""

from cubicweb import Binary

from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class RequestsTC(S3TC):
    cache_size = 0

    def spent(self, do) -> list[str]:
        with self.admin_access.repo_cnx() as cnx:
            do(cnx)
        return self.s3.requests

    def test_starting_costs_nothing(self):
        self.assertEqual(self.s3.requests, [])

    def test_create_is_1_put(self):
        self.committed()
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            cnx.commit()
        self.assertEqual(self.s3.requests, ["PUT"])

    def test_read_is_1_get(self):
        eid = self.committed()
        self.read(eid)
        self.assertEqual(self.s3.requests, ["GET"])

    def test_update_is_1_put_and_1_delete(self):
        eid = self.committed()
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.s3.requests, ["PUT", "DELETEMANY"])

    def test_delete_of_2500_is_3_requests(self):
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(3):
                self.create(cnx)
            cnx.commit()
            (template,) = cnx.execute("Any X LIMIT 1 WHERE X is Document").entities()
            from cubicweb_s3storage.storages import S3DeleteFileOp

            self.s3.requests.clear()
            operation = S3DeleteFileOp.get_instance(cnx)
            for n in range(2500):
                data = (self.storage, f"none-{n}", template.eid, "content")
                operation.add_data(data)
            cnx.commit()
        self.assertEqual(self.s3.requests, ["DELETEMANY"] * 3)

    def test_delete_of_many_entities_is_1_request(self):
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(20):
                self.create(cnx)
            cnx.commit()
        self.s3.requests.clear()
        with self.admin_access.repo_cnx() as cnx:
            cnx.execute("DELETE Document X")
            cnx.commit()
        self.assertEqual(self.s3.requests, ["DELETEMANY"])

    def test_rollback_of_many_is_1_request_more(self):
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(20):
                self.create(cnx)
            self.uploaded(cnx)
            cnx.rollback()
        self.assertEqual(self.s3.requests, ["PUT"] * 20 + ["DELETEMANY"])

    def test_a_new_overridden_key_is_1_head_more(self):
        for storage_class in (ContentHashStorage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                self.create(cnx)
                cnx.commit()
            self.assertEqual(self.s3.requests, ["HEAD", "PUT"])
            self.s3.requests.clear()

    def test_an_object_replaced_under_its_key_is_staged_and_moved(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.s3.requests, ["HEAD", "PUT", "COPY", "DELETEMANY"])

    def test_with_versions_overridden_keys_cost_no_copy(self):
        self.keep_versions()
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
            self.read(eid)
        self.assertEqual(self.s3.requests, ["PUT", "DELETEMANY", "GET"])
