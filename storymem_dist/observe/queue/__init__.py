"""The queue of a run folder as people see and change it: what is known, what runs, what comes next, and requests.

``known`` finds the stories, ``jobs`` the running replicas, ``view`` puts the queue together, ``asking`` publishes a
request and says what it does, ``adding`` turns storyboards into requests. The command ``storymem-queue`` and the live
page use the same functions. Reads the run folder alone and never loads torch.
"""
