from yams.buildobjs import Bytes, EntityType, String


class Document(EntityType):
    title = String(indexed=True)
    data = Bytes()
