"The server of jobs, one a test process."
import pytest


@pytest.fixture(scope="session")
def jobs():
    from .harness import Jobs
    jobs = Jobs()
    yield jobs
    jobs.close()
