"""Files of a data set at a URL: whole files and byte ranges, verified; outages are waited for.

store.py        Store: a folder at https://, s3://, gs://, az://, hf:// or `pipe:`
urls.py         supported URLs, and how names of files are appended
transports.py   one attempt of one request: object_store.py, web_server.py, program.py
answers.py      statuses and headers of responses: which failures are transient
outages.py      repetition of transient failures, and its reports
credentials.py  credentials and time-outs of the object stores
"""
