"The server of jobs, one a test process, and the commit that is tried."
import pytest


@pytest.fixture(scope="session", autouse=True)
def _commit():
    from .harness import begun
    begun()


@pytest.fixture(scope="session")
def jobs():
    from .harness import Jobs
    jobs = Jobs()
    yield jobs
    jobs.close()
