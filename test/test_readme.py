"""Every command and snippet of the README does what the README says."""

import os
import re
import subprocess
import sys
import textwrap
import unittest
import uuid
from pathlib import Path

from cubicweb import Binary
from docutils import nodes
from docutils.core import publish_doctree

import testlib
from cubicweb_s3storage.storages import S3Storage
from instance import Instance
from testlib import S3TC

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text(encoding="utf-8")
TREE = publish_doctree(README, settings_overrides={"report_level": 2, "halt_level": 2})
USED = set()


def block(text: str) -> str:
    """The one literal block that has this text."""
    (found,) = (
        number
        for number, node in enumerate(TREE.findall(nodes.literal_block))
        if text in node.astext()
    )
    USED.add(found)
    return list(TREE.findall(nodes.literal_block))[found].astext()


HOOK = block("S3StorageStartupHook")


class CommandsTC(unittest.TestCase):
    def run_in_checkout(self, command: str) -> str:
        """Run what follows `.venv/bin/` with the Python of this test."""
        *preparation, command = command.split(" && ")
        self.assertEqual(preparation[0], "python3 -m venv .venv")
        self.assertRegex(preparation[1], r"^\.venv/bin/pip install -q -e '\.\[\w+\]'$")
        program, *arguments = command.removeprefix(".venv/bin/").split()
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("AWS_")
        }
        done = subprocess.run(
            [
                sys.executable,
                *(["-m", program] if program != "python" else ()),
                *arguments,
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def test_the_demonstration(self):
        output = self.run_in_checkout(block("demo/demo.py"))
        self.assertIn("Everything is as it should be", output)
        for path in (ROOT / "demo" / "files").iterdir():
            self.assertIn(path.name, output)

    def test_the_tests(self):
        command = block("/pytest")
        output = self.run_in_checkout(
            f"{command} --collect-only -q test/test_readme.py"
        )
        self.assertIn("CommandsTC::test_the_tests", output)

    def test_the_names_of_the_package(self):
        package = block("pip install cubicweb-s3storage").split()[-1]
        output = subprocess.check_output(
            [sys.executable, "-m", "pip", "show", package], text=True
        )
        self.assertIn("Name: cubicweb-s3storage", output)


class InstanceTC(unittest.TestCase):
    """The way of an instance that exists: add the cube, the hook, migrate."""

    def test_an_instance_gets_its_files_into_s3(self):
        server = testlib.endpoint()
        server.faults.clear()
        bucket = f"test-{uuid.uuid4()}"
        server.client().create_bucket(Bucket=bucket)
        environment = self.environment_of_minio(server.url)
        instance = Instance(self, "file", **environment)
        instance.shell(
            "from cubicweb import Binary\n"
            "create_entity('File', data=Binary(b'content'), data_name='a.txt')\n"
            "commit()\n"
        )
        instance.shell(block("add_cube("))
        instance.ctl("upgrade", "--force", "-v", "0", "--backup-db=n", instance.name)
        configuration = (instance.home / "all-in-one.conf").read_text()
        for option in ("auto-delete=yes", "transaction-suffix-key=no"):
            self.assertRegex(configuration, rf"(?m)^s3-{option}$")
        self.assertRegex(configuration, r"(?m)^s3-activate-object-versioning=no$")
        self.assertIn("Remove the S3 object", configuration)
        instance.add_hook(HOOK.replace("my-bucket", bucket))
        instance.shell(block("storage_changed("))
        cubes = instance.ctl("list", "cubes")
        self.assertRegex(cubes, r"s3storage\s+5\.")
        output = instance.shell(
            block("STKEY")
            + "\nfor (eid, key) in keys.items():\n"
            + "    print('KEY', key, cnx.entity_from_eid(eid).data.getvalue())\n"
        )
        ((key, content),) = re.findall(r"KEY (\S+) b'(.*)'", output)
        self.assertEqual(content, "content")
        answer = server.client().get_object(Bucket=bucket, Key=key)
        self.assertEqual(answer["Body"].read(), b"content")
        server.client().delete_object(Bucket=bucket, Key=key)
        server.client().delete_bucket(Bucket=bucket)

    def environment_of_minio(self, url: str) -> dict[str, str]:
        environment = dict(
            line.removeprefix("export ").split("=", 1)
            for line in block("minioadmin").splitlines()
        )
        self.assertEqual(set(environment) - set(os.environ), {"AWS_S3_ENDPOINT_URL"})
        return {**environment, **os.environ, "AWS_S3_ENDPOINT_URL": url}


def ours(snippet: str) -> str:
    """A snippet with the entity type and attributes of these tests."""
    for theirs, our in (
        ("data_name", "title"),
        ('"File"', '"Document"'),
        ("is File", "is Document"),
        (" data D", " content D"),
        ("data=", "content="),
        ("entity.data", "entity.content"),
        ('"data"', '"content"'),
    ):
        snippet = snippet.replace(theirs, our)
    return snippet


class SnippetsTC(S3TC):
    def run_snippet(self, text: str, **names) -> dict:
        exec(ours(block(text)).replace("my-bucket", self.bucket), names)
        return names

    def test_the_hook(self):
        hook = self.run_snippet("S3StorageStartupHook")["S3StorageStartupHook"]
        self.repo.system_source.unset_storage("Document", "content")
        with self.admin_access.repo_cnx() as cnx:
            hook(cnx, "server_startup", repo=self.repo)()
        storage = self.repo.system_source.storage("Document", "content")
        self.assertEqual(storage.bucket, self.bucket)

    def test_keys_by_content(self):
        storage_class = self.run_snippet("class ContentHashStorage")
        storage = storage_class["ContentHashStorage"](self.bucket)
        self.set_storage("Document", "content", storage)
        self.assertEqual(self.row(self.committed()), self.row(self.committed()))
        self.assertEqual(list(self.objects().values()), [b"content"])

    def test_keys_by_entity(self):
        storage = self.run_snippet("class EntityStorage")["EntityStorage"]
        self.set_storage("Document", "content", storage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        key = f"Document/{eid}/content"
        self.assertEqual(self.objects(), {key: b"new"})
        answer = self.client.head_object(Bucket=self.bucket, Key=key)
        self.assertEqual(answer["CacheControl"], "max-age=60")

    def test_stkey(self):
        eid = self.committed()
        with self.admin_access.repo_cnx() as cnx:
            keys = self.run_snippet("STKEY", cnx=cnx)["keys"]
        self.assertEqual(keys, {eid: self.row(eid)})

    def test_adoption(self):
        self.put("scans/0001.tif", b"scan")
        with self.admin_access.repo_cnx() as cnx:
            self.run_snippet("fsimport", cnx=cnx)
            ((value,),) = cnx.execute("Any D WHERE X is Document, X content D").rows
        self.assertEqual(value.getvalue(), b"scan")

    def test_missing_object(self):
        self.set_option("s3-cache-size", 0)
        eid = self.committed()
        self.client.delete_object(Bucket=self.bucket, Key=self.row(eid))
        with self.admin_access.repo_cnx() as cnx:
            shown = []
            entity = cnx.entity_from_eid(eid)
            self.run_snippet("except ObjectMissing", entity=entity, print=shown.append)
        self.assertIn(self.bucket, str(shown[0]))


class ApplicationTestsTC(unittest.TestCase):
    def test_tests_of_an_application(self):
        names = {"__name__": __name__}
        exec(ours(block("class MyCubeTC")), names)

        class WithHook(names["MyCubeTC"]):
            def setUp(self):
                super().setUp()
                source = self.repo.system_source
                source.set_storage("Document", "content", S3Storage("my-bucket"))
                source.clear_caches(None, None)

            def tearDown(self):
                self.repo.system_source.unset_storage("Document", "content")
                super().tearDown()

        result = unittest.TestResult()
        unittest.TestSuite([WithHook("test_file")]).run(result)
        self.assertEqual(result.errors + result.failures, [])
        self.assertEqual(result.testsRun, 1)


class PostgresIndexTC(unittest.TestCase):
    def test_the_index(self):
        import pgserver

        if not pgserver.programs():
            self.skipTest("PostgreSQL is not installed")
        import psycopg2

        connection = psycopg2.connect(host=pgserver.start(), dbname="postgres")
        self.addCleanup(connection.close)
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE cw_file (cw_eid integer, cw_data bytea)")
        cursor.execute(block("CREATE INDEX"))
        cursor.execute("SET enable_seqscan = off")
        cursor.execute("EXPLAIN SELECT cw_eid FROM cw_file WHERE cw_data IN ('a', 'b')")
        self.assertIn("file_data_key", str(cursor.fetchall()))


class CompletenessTC(unittest.TestCase):
    def test_no_snippet_is_left_out(self):
        source = Path(__file__).read_text(encoding="utf-8")
        for wanted in re.findall(r'(?:block|run_snippet)\(\s*"(.+?)"', source):
            block(wanted)
        snippets = [node.astext() for node in TREE.findall(nodes.literal_block)]
        missing = [text for n, text in enumerate(snippets) if n not in USED]
        self.assertEqual(missing, [], textwrap.indent("\n".join(missing), "    "))
