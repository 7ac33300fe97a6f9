"""The way of a query through the rooms (packages), and a table of the rooms in the order of their imports.

``run`` plans the work units of a query set and gives them to actors. An actor reads the rows of a unit (``queries``)
and decodes each of them: decide, retrieve, generate, critique, choose (``decoding``). Decoding asks a model
(``engine``) and an index (``retrieval``) through protocols. The annotated rows are written as the files of the unit
(``output``), at any URI (``storage``). Scores and a report come after the run (``evaluation``, ``report``); the index
(``indexing``) and an adapter for the model (``training``) come before it.

A room imports itself, libraries, and the rooms in the last column; ``tests/pipeline/test_rooms.py`` holds the code to
this table.

=============  ============================================================  ======================================
room           holds                                                         may import
=============  ============================================================  ======================================
config         the settings of a run: models, loading, reference             nothing
versions       versions of the installed packages that decide results        nothing
gpus           the GPUs that Ray has assigned to this process                nothing
storage        bytes at any URI: locations, the lease, Parquet               config
decoding       the algorithm of the paper, and its protocols                 config
training       an adapter that teaches a model the reflection tokens         decoding
demo_models    the embedded model, encoder and reranker, built on first use  config training
engine         the model process: vLLM, its watchdog, causes of its death    config decoding demo_models gpus
cluster        connecting to Ray; what an actor gets of a cluster            config engine
nodes          the machines of a cluster: what each must read and write      cluster config storage
retrieval      search: encoder, FAISS shards, servers, cache, the reranker   config decoding demo_models gpus nodes
                                                                             storage
output         an annotated set: unit files, sub-files, manifest, card       config decoding storage
queries        a query set: checked, cut into units, imported, selected      config decoding output storage
indexing       an index: built, planned and checked                          cluster config decoding nodes retrieval
                                                                             storage
evaluation     answers scored against gold, and chosen again                 cluster config decoding nodes output
                                                                             queries storage
report         one HTML page about an annotated set                          config decoding evaluation output storage
publishing     a finished set registered in tables: Delta Lake, Iceberg      config output queries storage
run            a run from top to bottom: plan, driver, actor, attempts       cluster config decoding engine gpus nodes
                                                                             output queries report retrieval storage
                                                                             versions
tuning         settings of the engine, tried on a sample of a run's rows     cluster config engine nodes output queries
                                                                             run storage versions
tracking       a run recorded in OpenLineage and MLflow                      cluster config output run storage
doctor         what a machine and a cluster can do, tried out                config decoding engine gpus retrieval
                                                                             storage versions
=============  ============================================================  ======================================
"""
