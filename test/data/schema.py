from yams.buildobjs import Bytes, EntityType, String


class Document(EntityType):
    title = String()
    content = Bytes()
    content_format = String()
    thumbnail = Bytes()


class Scan(EntityType):
    title = String()
    content = Bytes()
