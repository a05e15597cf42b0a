# pullpool in a container: no compiler, no package manager's cache, no root.
#
# BASE is any image with python3 >= 3.11 and its venv module. Where the package index cannot be
# reached during the build, put a directory `wheelhouse` beside this file, filled by
#   pip download --dest wheelhouse --constraint deploy/constraints.txt '.[fleet]' hatchling
# and nothing is asked of an index.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
# Given as --build-arg when there is an index of your own; an argument is not kept in the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY . .
RUN if [ -d wheelhouse ]; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/source/wheelhouse; fi \
    && python3 -m venv /opt/pullpool \
    && /opt/pullpool/bin/pip install --constraint deploy/constraints.txt '.[fleet]' \
    && /opt/pullpool/bin/pip uninstall --yes pip setuptools \
    && install --directory --owner 65532 --group 65532 /cache

FROM ${BASE}
LABEL org.opencontainers.image.title="pullpool" \
      org.opencontainers.image.description="Many pulls, few connections: a caching pull-through proxy" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/pullpool /opt/pullpool
# A new volume takes the owner of the directory that it covers.
COPY --from=build --chown=65532:65532 /cache /var/lib/pullpool
ENV PATH=/opt/pullpool/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PULLPOOL_LISTEN=0.0.0.0:5050 \
    PULLPOOL_ADMIN=127.0.0.1:5051 \
    PULLPOOL_CACHE_DIR=/var/lib/pullpool \
    PULLPOOL_LOG_FORMAT=json
USER 65532:65532
VOLUME /var/lib/pullpool
EXPOSE 5050
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["pullpool", "healthcheck"]
ENTRYPOINT ["pullpool"]
CMD ["serve"]
